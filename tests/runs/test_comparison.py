"""The grid of methods: each cell is what prune and evaluate give by themselves, and none is run twice."""

import json
import math
import shutil
from dataclasses import replace

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


@pytest.fixture
def grid(tiny, prose, tmp_path):
    """A grid in the folder "grid", of one cell or a few, on this text and model or others."""

    def made(*patterns: str, methods=("wanda",), model=None, calibration=prose, evaluation=prose, length=32) -> Grid:
        settings = CompareSettings(methods=methods, patterns=patterns or ("2:4",), seeds=1)
        text = CalibrationSettings(dataset=str(calibration), samples=1, sequence_length=32, seed=7)
        asked = EvaluateSettings(dataset=str(evaluation), sequence_length=length, max_windows=3)
        return Grid(Reference(model or tiny("llama")), tmp_path / "grid", settings, text, asked, ComputeSettings())

    return made


def test_cells_are_what_the_stages_give_and_are_reused(grid, tmp_path, progress, monkeypatch) -> None:
    what = grid(methods=("paper", "obs+fast"))
    model, output, result = what.dense.source, what.output, compare(what, progress)
    assert [(c.method, c.pattern, c.seed) for c in result.cells] == [("paper", "2:4", 0), ("obs+fast", "2:4", 0)]
    text = what.calibration.model_copy(update={"seed": 0})
    prune(model, tmp_path / "p", PruneSettings(method="obs", fit="fast", pattern="2:4"), text)
    alone = evaluate(ModelSource("p", tmp_path / "p"), what.evaluation, baseline=model, progress=progress)
    assert result.cells[1].perplexity == pytest.approx(alone.metrics["perplexity"].value, rel=1e-5)
    assert result.cells[1].mean_kl == pytest.approx(alone.fidelity["mean_kl"], rel=1e-4)
    assert result.dense_perplexity == pytest.approx(alone.baseline["perplexity"].value, rel=1e-6)
    assert json.loads((output / comparison.REPORT).read_text()) == json.loads(json.dumps(result.as_dict()))
    assert (output / comparison.PLOT).stat().st_size > 5000 and not list(output.glob(".cell-*"))
    monkeypatch.setattr(comparison, "prune", lambda *_: pytest.fail("a cell on record was run again"))
    assert compare(what, progress).cells == result.cells


def test_summaries_are_means_and_standard_errors_over_seeds() -> None:
    one = Cell("a", "2:4", 0, 10.0, 9.0, 0.5, 0.5, accuracy=0.5, recovery=None, seconds=1.0)
    two = replace(one, seed=1, perplexity=12.0, accuracy=0.7, seconds=3.0)
    three = replace(one, seed=2, perplexity=17.0, accuracy=None, seconds=2.0)
    first, second = summarise([one, two, three, replace(one, method="b", accuracy=None)])
    assert [first[name] for name in ("method", "seeds", "perplexity", "seconds")] == ["a", 3, 13.0, 2.0]
    assert first["perplexity_error"] == pytest.approx(math.sqrt(13.0 / 3))
    assert first["accuracy"] == pytest.approx(0.6)
    assert [second[name] for name in ("method", "perplexity_error", "accuracy")] == ["b", None, None]


def test_methods_and_what_is_chosen_with_them() -> None:
    for name, settings in (
        ("gblm+fast+sensitivity+int8", {"fit": "fast", "allocation": "sensitivity", "quantise": "int8"}),
        ("obs+obs", {"method": "obs", "fit": "obs"}),
        ("paper", {"preset": "paper", "fit": "none"}),
    ):
        chosen = PruneSettings(**{"method": "gblm", "pattern": "2:4"} | settings)
        assert CompareSettings.prune_settings(name, "2:4") == chosen
    for method, message in (
        ("wand", "'wand' is neither a preset nor a method"),
        ("wanda+swop", "'swop' is not a fit, allocation or grid"),
        ("wanda+obs+fast", "or is the second of its kind"),
    ):
        with pytest.raises(ValidationError, match=message):
            CompareSettings(methods=(method,))


def test_faults_are_found_before_the_first_pruning(grid, tiny, tmp_path, progress, monkeypatch) -> None:
    monkeypatch.setattr(comparison, "prune", None)
    shutil.copytree(tiny("llama").folder, tmp_path / "export")
    (tmp_path / "export" / "model.onnx").touch()
    for wrong, kind, message in (
        (grid(evaluation="gone.txt"), DataError, "gone.txt.*no such file"),
        (grid(calibration="./1.txt", evaluation="./2.txt"), DataError, "2 faults\n.*1.txt': no .*\n.*2.txt': no"),
        (grid(length=2048), UsageError, "positions; sequence length is 2048"),
        (grid("2:4", "2:7"), UsageError, "not a multiple of 7"),
        (grid(model=ModelSource("", tmp_path / "export")), ModelError, "is an export"),
    ):
        with pytest.raises(kind, match=message):
            compare(wrong, progress)
        assert not (tmp_path / "grid").exists()
