"""A whole run on a tiny model: artefacts, report, reuse, gates."""

import json
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from gblm_compress.cli.summaries import parts
from gblm_compress.errors import UsageError
from gblm_compress.kernels import cpu
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models.finding import find_here
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import walk
from gblm_compress.runs import pipeline, report, run_report, stages
from gblm_compress.runs.job import Job, read_record
from gblm_compress.runs.recipe import find_recipe, load_recipe
from gblm_compress.runs.stages import stages_of
from gblm_compress.storage.outputs import working_in
from tests.conftest import edit_json

QUIET = Progress(quiet=True)


def smoke(*overrides: str):
    return load_recipe(find_recipe("ci-smoke"), ("benchmark.batch=[1]", *overrides))


def redone(report: pipeline.RunReport) -> set[str]:
    return {stage.name for stage in report.stages if not stage.reused}


@pytest.fixture(scope="module", autouse=True)
def _module_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GBLM_COMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pipeline.RunReport]:
    output = tmp_path_factory.mktemp("run")
    return output, pipeline.run(smoke(), output, QUIET)


def test_artefacts_and_report(finished) -> None:
    output, result = finished
    content = json.loads((output / "report.json").read_text())
    assert content == json.loads(json.dumps(result.as_dict())) and content["passed"] is True
    assert run_report.read(output) == run_report.read(output / "report.json")
    assert run_report.read(output).rows == result.rows
    assert [stage.name for stage in result.stages] == [
        "prune", "export bitmask", "export onnx", "export semi-structured", "export dense-onnx",
        "evaluate pruned", "evaluate bitmask", "evaluate onnx", "benchmark",
    ]  # fmt: skip
    (command,) = result.commands
    assert command == f"gblm-compress run {output / 'recipe.json'} -o {output}"
    assert load_recipe(output / "recipe.json").model_dump() == smoke().model_dump()
    assert "(same data as calibration: on other" in result.conditions["evaluation"]
    assert (output / report.PAGE).read_text().count("same data as calibration") == 2  # a note, and a condition
    assert len([*(output / report.PICTURES).iterdir()]) == 6  # as no zeros differ between layers, and none recovered


def test_rows_set_dense_against_pruned_per_runtime(finished) -> None:
    _, result = finished
    times = {row.artefact: row for row in result.find("ttft_ms")}
    assert {name: (row.runtime, row.dense) for name, row in times.items()} == {
        "dense": ("torch", True), "pruned": ("torch", False), "bitmask": ("torch", False),
        "dense-onnx": ("onnxruntime", True), "onnx": ("onnxruntime", False),
    }  # fmt: skip
    assert {row.artefact: row.value for row in result.find("density")} == {
        "dense": 1.0, "pruned": 0.5, "bitmask": 0.5, "semi-structured": 0.5, "dense-onnx": 1.0, "onnx": 0.5,
    }  # fmt: skip
    quality = {row.artefact: row for row in result.find("perplexity")}
    assert quality["onnx"].value == pytest.approx(quality["pruned"].value, rel=1e-3)
    assert quality["dense"].value == quality["pruned"].baseline != quality["pruned"].value
    assert {row.artefact for row in result.find("decode_speedup")} == {"pruned", "bitmask", "onnx"}
    assert result.find("bytes_ratio", "bitmask")[0].value < 0.7
    assert {row.figure for row in result.rows if row.part} >= {"decode_kernels", "step_ms", "weights", "output_error"}


def test_a_run_whose_model_lies_where_it_would_write_is_refused_by_its_check(finished) -> None:
    output, _ = finished
    faults = pipeline.check_output(smoke(f"model={output / 'pruned'}"), output)
    assert ["is the input" in str(fault) for fault in faults] == [True]
    assert not pipeline.check_output(smoke(), output)


def test_an_export_in_few_bits_is_held_against_the_dense_model_in_as_many(tmp_path) -> None:
    """Its zeros and the dense export's are counted after rounding, and both exports are evaluated."""
    exports = "export=[{format: bitmask-int4}, {format: onnx, graph: plain, quantise: int4}]"
    result = pipeline.run(smoke(exports, "gates=[]", "benchmark.runtimes=[onnxruntime]"), tmp_path, QUIET)
    int4, of_dense = "onnx-graph-plain-quantise-int4", "dense-onnx-quantise-int4"
    evaluated = [stage.name[9:] for stage in result.stages if stage.name.startswith("evaluate ")]
    assert evaluated == ["pruned", "bitmask-int4", int4, of_dense]
    quality = {row.artefact: row for row in result.find("perplexity")}
    assert 0 < abs(quality[of_dense].value / quality["dense"].value - 1) < 0.05 and quality[of_dense].dense
    assert result.find("mean_kl", of_dense)[0].value < result.find("mean_kl", int4)[0].value
    shares = {row.artefact: row.value for row in result.find("density")}
    assert shares["dense"] == 1.0 and shares["pruned"] == 0.5
    for name, before in ((of_dense, 1.0), (int4, 0.5), ("bitmask-int4", 0.5)):
        assert before - 0.2 < shares[name] < before
    model, pruned = load_model(ModelSource("", tmp_path / "bitmask-int4")), result.stages[0].result
    left = [count_nonzeros(model.get_submodule(name).dense_weight()) for name in pruned["layers"]]
    assert shares["bitmask-int4"] == sum(left) / pruned["weights"]


def test_without_pruning_exports_are_held_against_the_dense_model(tmp_path) -> None:
    name, dense = "onnx-quantise-int8", "dense-onnx"
    gates = f"gates=[{{max_mean_kl: 0.1, max_bytes_ratio: 0.9}}, {{artefact: {name}, min_decode_speedup: 99}}]"
    exports = "export=[{format: onnx, quantise: int8}]"
    result = pipeline.run(smoke("prune=null", exports, gates), tmp_path, QUIET)
    assert [gate.gate for gate in result.gates if gate.passed] == ["max_mean_kl", "max_bytes_ratio"]
    assert [gate.gate for gate in result.failed_gates] == ["min_decode_speedup"]
    assert {(row.artefact, row.dense) for row in result.rows} == {("dense", True), (dense, True), (name, False)}
    assert 0 < result.find("mean_kl", name)[0].value < 0.1 and result.find("decode_speedup", name)
    assert result.find("perplexity", name)[0].baseline == result.find("perplexity", "dense")[0].value
    assert {row.dtype for row in result.find("tpot_ms")} == {"float32"}
    assert run_report.verdict(result).beside == dense and result.method == "exports of the dense model"
    assert "is the baseline" in result.conditions["pruning"] and "is the baseline" in report.junit(result)
    assert redone(pipeline.run(smoke("prune=null", exports, gates), tmp_path, QUIET)) == set()


def test_a_cut_off_prune_stage_goes_on_where_it_was_unless_the_recipe_changed(tmp_path, monkeypatch) -> None:
    """Two of the four runs end at their second block, the others before their exports."""
    original, begun = walk.prune_block_, []

    def prune_block(block, layers, *others):
        begun.append(next(iter(layers)).split(".")[2])
        if len(begun) in (2, 5):
            raise KeyboardInterrupt
        return original(block, layers, *others)

    monkeypatch.setattr(walk, "prune_block_", prune_block)
    monkeypatch.setattr(stages, "export", MagicMock(side_effect=KeyboardInterrupt))
    for changes in ((), (), ("prune.alpha=50",), ("prune.alpha=60",)):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(smoke(*changes), tmp_path / "out", QUIET)
    assert begun == [*"01", *"1", *"01", *"01"] and not list(tmp_path.glob("out/.pruned*"))


def test_only_what_a_change_touches_is_done_again(finished) -> None:
    output, first = finished
    evaluations = {"evaluate pruned", "evaluate bitmask", "evaluate onnx"}
    assert redone(pipeline.run(smoke("evaluate.max_windows=4"), output, QUIET)) == evaluations
    again = pipeline.run(smoke(), output, QUIET)
    assert redone(again) == evaluations and again.rows == first.rows
    assert redone(pipeline.run(smoke(), output, QUIET)) == set()
    anew = {stage.name: stage for stage in stages_of(Job(smoke("prune.alpha=77"), find_here("tiny"), output))}
    held = {name: read_record(name, output, QUIET).holds(stage) for name, stage in anew.items()}
    assert not held["prune"] and held["export dense-onnx"]


def test_a_task_file_decides_the_evaluations_that_ask_its_task(tmp_path) -> None:
    pytest.importorskip("lm_eval")
    recipe = smoke("evaluate.tasks=[own]", f"evaluate.include_path={tmp_path}")
    listed = [stage for stage in stages_of(Job(recipe, None, tmp_path)) if stage.name.startswith("evaluate ")]
    decided = []
    for content in ("task: own\n", "task: own\n\n"):
        (tmp_path / "own.yaml").write_text(content)
        decided.append([stage.decides() for stage in listed])
    changed = [stage.name for stage, *two in zip(listed, *decided, strict=True) if two[0] != two[1]]
    assert changed == ["evaluate pruned", "evaluate bitmask"]


def test_the_dense_model_reads_every_window_once_for_all_evaluations(finished, monkeypatch) -> None:
    output, first = finished
    original, read = TorchRuntime.predict, []

    def predict(runtime, sample):
        read.append(runtime.model.config.name_or_path)
        return original(runtime, sample)

    for path in output.glob(".stages/evaluate-*.json"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(TorchRuntime, "predict", predict)
        again = pipeline.run(smoke(), output, QUIET)
    windows = smoke().evaluate.max_windows
    assert Counter(Path(name).name for name in read) == {"tiny": windows, "pruned": windows, "bitmask": windows}
    assert again.rows == first.rows


def test_damaged_records_and_artefacts_are_made_again(finished, capsys) -> None:
    output, first = finished
    (output / "semi-structured" / "gblm_sparse.safetensors").write_bytes(b"junk")
    path = output / ".stages" / "evaluate-pruned.json"
    edit_json(path, seconds=0.0)
    again = pipeline.run(smoke(), output, Progress())
    assert f"{path} is damaged and ignored" in capsys.readouterr().err.replace("\n", "")
    assert redone(again) == {"evaluate pruned", "export semi-structured"}
    assert again.rows == first.rows


def test_a_foreign_file_where_a_stage_writes_is_found_before_the_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stages, "prune", lambda *_, **__: pytest.fail("the work began"))
    with working_in(tmp_path, "run"):
        for name in ("onnx", "dense-onnx"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "notes.txt").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        pipeline.run(smoke(), tmp_path / "onnx" / "notes.txt" / "out", QUIET)
    with pytest.raises(UsageError, match=r"(?s)2 faults.*/onnx' exists and was not made.*/dense-onnx' exists"):
        pipeline.run(smoke(), tmp_path, QUIET)


def test_a_run_without_kernels_says_so_at_its_start_and_in_its_report(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "library_file", lambda: None)
    export = "export=[{format: onnx, graph: plain, kernels: auto}]"
    bare = smoke("prune.fit=none", export, "evaluate=null", "benchmark=null", "gates={}")
    result = pipeline.run(bare, tmp_path / "run", Progress())
    said, fact = capsys.readouterr().err, "export onnx-graph-plain is dense, so zeros save neither bytes nor time"
    assert said.index(f"note: {fact}") < said.index("• prune")
    assert any(f"kernels: {fact}" in str(part) for part in parts("run", result))
    assert fact in run_report.read(tmp_path / "run").conditions["kernels"]


def test_own_text_is_trained_on_and_the_recovered_model_exported(tmp_path) -> None:
    changes = (
        "calibration.dataset=self", "calibration.sequence_length=32", "recover.data=[demo=0.5, self=0.5]",
        "recover.tokens=1280", "recover.sequence_length=32", "recover.batch=2", "export=[{format: bitmask}]",
        "benchmark=null", "gates={}",
    )  # fmt: skip
    output = tmp_path / "run"
    result = pipeline.run(smoke(*changes), output, QUIET)
    names = ["prune", "recover", "export bitmask", "evaluate recovered", "evaluate bitmask"]
    assert [stage.name for stage in result.stages] == names
    assert redone(pipeline.run(smoke(*changes), output, QUIET)) == set()
    manifest = json.loads((output / "bitmask" / "gblm_manifest.json").read_text())
    assert manifest["source_sha256"] == ModelSource("", output / "recovered").fingerprint
    curve, looks = result.stages[1].result["curve"], result.find("held_out_loss")
    assert [(look.tokens, look.value) for look in looks] == [(s["tokens"], s["held_out"]) for s in curve]
    assert min(looks, key=lambda look: look.value).part == "kept"
