"""The grid of methods: each cell is what prune and evaluate give by themselves, and none is run twice."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
from pydantic import ValidationError

from gblm_compress.errors import DataError, ModelError, UsageError
from gblm_compress.measure.evaluation import Reference, evaluate
from gblm_compress.models.source import ModelSource
from gblm_compress.runs import comparison
from gblm_compress.runs.comparison import Cell, Grid, compare, summarise
from gblm_compress.settings import (
    CalibrationSettings,
    CompareSettings,
    ComputeSettings,
    EvaluateSettings,
    PruneSettings,
)
from tests.conftest import prune


def cell(method: str, seed: int, perplexity: float, **other) -> Cell:
    values = {
        "pattern": "2:4", "dense_perplexity": 9.0, "mean_kl": 0.5, "top1_agreement": 0.5, "accuracy": None,
        "recovery": None, "seconds": 2.0, "peak_memory_bytes": 10,
    }  # fmt: skip
    return Cell(method=method, seed=seed, perplexity=perplexity, **(values | other))


def test_cells_are_what_the_stages_give_and_are_reused(tiny, prose, tmp_path, progress, monkeypatch) -> None:
    chosen = CompareSettings(methods=("paper", "obs+fast"), patterns=("2:4",), seeds=1)
    text = CalibrationSettings(dataset=str(prose), samples=2, sequence_length=32, seed=7)
    evaluation = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=3)
    output = tmp_path / "grid"
    what = Grid(Reference(tiny("llama")), output, chosen, text, evaluation, ComputeSettings())
    result = compare(what, progress)
    assert [(c.method, c.pattern, c.seed) for c in result.cells] == [("paper", "2:4", 0), ("obs+fast", "2:4", 0)]
    settings = PruneSettings(method="obs", fit="fast", pattern="2:4")
    prune(tiny("llama"), tmp_path / "p", settings, text.model_copy(update={"seed": 0}), progress=progress)
    alone = evaluate(ModelSource("p", tmp_path / "p"), evaluation, baseline=tiny("llama"), progress=progress)
    assert result.cells[1].perplexity == pytest.approx(alone.metrics["perplexity"].value, rel=1e-5)
    assert result.cells[1].mean_kl == pytest.approx(alone.fidelity["mean_kl"], rel=1e-4)
    assert result.dense_perplexity == pytest.approx(alone.baseline["perplexity"].value, rel=1e-6)
    assert json.loads((output / comparison.REPORT).read_text()) == json.loads(json.dumps(result.as_dict()))
    assert (output / comparison.PLOT).stat().st_size > 5000
    assert not list(output.glob(".cell-*"))

    monkeypatch.setattr(comparison, "_in_own_process", lambda *_: pytest.fail("a cell on record was run again"))
    assert compare(what, progress).cells == result.cells


def test_summaries_are_means_and_standard_errors_over_seeds() -> None:
    cells = [
        cell("a", 0, 10.0, seconds=1.0, accuracy=0.5),
        cell("b", 0, 20.0),
        cell("a", 1, 12.0, seconds=3.0, peak_memory_bytes=30, accuracy=0.7),
        cell("a", 2, 17.0, seconds=2.0),
    ]
    first, second = summarise(cells)
    assert [first[name] for name in ("method", "seeds", "perplexity", "seconds")] == ["a", 3, 13.0, 2.0]
    assert first["perplexity_error"] == pytest.approx(math.sqrt(13.0 / 3))
    assert first["peak_memory_bytes"] == 30 and first["accuracy"] == pytest.approx(0.6)
    assert [second[name] for name in ("method", "perplexity_error", "accuracy")] == ["b", None, None]


def test_methods_and_what_is_chosen_with_them() -> None:
    for name, pattern, settings in (
        ("gblm+fast+sensitivity+int8", "4:8", {"fit": "fast", "allocation": "sensitivity", "quantise": "int8"}),
        ("obs+obs", "2:4", {"method": "obs", "fit": "obs"}),
        ("obs+best", "2:4", {"method": "obs", "fit": "best"}),
        ("paper", "2:4", {"preset": "paper", "fit": "none"}),
    ):
        chosen = PruneSettings(**{"method": "gblm", "pattern": pattern} | settings)
        assert CompareSettings.prune_settings(name, pattern) == chosen
    for method, message in (
        ("wand", "'wand' is neither a preset nor a method"),
        ("wanda+swop", "'swop' is no fit, allocation or grid"),
        ("wanda+obs+fast", "or the second of its kind"),
    ):
        with pytest.raises(ValidationError, match=message):
            CompareSettings(methods=(method,))


@pytest.fixture
def grid(tiny, prose, tmp_path):
    """A grid of one cell or a few, in the folder "grid", on this text and model or others."""

    def made(*patterns: str, model=None, calibration=prose, evaluation=prose, length: int = 32) -> Grid:
        settings = CompareSettings(methods=("wanda",), patterns=patterns or ("2:4",), seeds=1)
        text = CalibrationSettings(dataset=str(calibration), samples=1, sequence_length=32)
        asked, dense = EvaluateSettings(dataset=str(evaluation), sequence_length=length), model or tiny("llama")
        return Grid(Reference(dense), tmp_path / "grid", settings, text, asked, ComputeSettings())

    return made


def test_a_failing_cell_raises_its_own_error(grid, tmp_path, progress) -> None:
    """The error of the other process arrives as it was raised there."""
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="short.txt' gives 5 tokens"):
        compare(grid(calibration=tmp_path / "short.txt"), progress)


def test_a_cell_that_was_killed_is_named(grid, progress, monkeypatch) -> None:
    class Killed(ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: object) -> None:
            super().__init__(workers)

        def submit(self, *_):
            raise BrokenProcessPool

    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Killed)
    with pytest.raises(ModelError, match="the process that pruned by wanda, 2:4 was killed"):
        compare(grid(), progress)


def test_faults_are_found_before_the_first_pruning(grid, tiny, tmp_path, progress, monkeypatch) -> None:
    monkeypatch.setattr(comparison, "_in_own_process", None)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").touch()
    shutil.copy(tiny("llama").folder / "config.json", tmp_path / "export")
    for wrong, kind, message in (
        (grid(evaluation="gone.txt"), DataError, "gone.txt.*no such file"),
        (
            grid(calibration="./first.txt", evaluation="./second.txt"),
            DataError,
            "(?s)2 faults\ndataset './first.txt': no such file.*'./second.txt': no such",
        ),
        (grid(length=2048), UsageError, "positions; sequence length is 2048"),
        (grid("2:4", "2:7"), UsageError, "not a multiple of 7"),
        (grid(model=ModelSource("", tmp_path / "export")), ModelError, "is an export"),
    ):
        with pytest.raises(kind, match=message):
            compare(wrong, progress)
        assert not (tmp_path / "grid").exists()
