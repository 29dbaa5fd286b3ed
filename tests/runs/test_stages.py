"""Whatever shows before the work is found before the work, all of it at once."""

import sys
from pathlib import Path

import pytest

from gblm_compress.kernels import cpu
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.runs.job import Job, data_hash
from gblm_compress.runs.pipeline import check, outlook
from gblm_compress.runs.stages import stages_of
from gblm_compress.settings import Recipe
from tests.tasks import families

PARTS = {
    "calibration": {"dataset": "demo", "sequence_length": 64, "samples": 2},
    "evaluate": {"dataset": "demo", "sequence_length": 64},
}


def recipe(**keys) -> Recipe:
    return Recipe.model_validate({"model": "tiny", **PARTS, **keys})


def faults(**keys) -> list[str]:
    return [str(fault) for fault in check(recipe(**keys), Progress(quiet=True))]


SEMI, ONNX, OF_SEMI = [{"format": "semi-structured"}], [{"format": "onnx"}], {"artefact": "semi-structured"}
ON_CPU = {"model": {"source": "tiny", "device": "cpu"}, "prune": {"pattern": "2:4"}, "export": SEMI}
SHORT = {"prompt": 8, "generate": 8}
IN_TORCH = {"benchmark": {**SHORT, "runtimes": ["torch"]}}
DENSE_INT8 = {"prune": None, "export": [{"format": "onnx", "quantise": "int8"}], "benchmark": SHORT}
MIXED = {"pattern": "2:4", "overrides": [{"layers": "*.0.mlp.*", "pattern": "3:4"}]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "./gone"}, "model './gone': no such folder"),
        ({"model": {"source": "tiny", "device": "gpu9"}}, "device 'gpu9' is not supported"),
        ({"calibration": {"dataset": "./gone.txt", "sequence_length": 64}}, "dataset './gone.txt': no such file"),
        ({"calibration": {"dataset": "demo"}}, "512 positions; calibration.sequence_length is 2048"),
        ({"evaluate": {"dataset": "gone.jsonl", "sequence_length": 64}}, "dataset 'gone.jsonl': no such file"),
        ({"evaluate": {"dataset": "demo"}}, "512 positions; sequence length is 2048"),
        ({"recover": {"data": ["gone.txt"]}}, "dataset 'gone.txt': no such file"),
        ({"recover": {"sequence_length": 1024}}, "512 positions; recover.sequence_length is 1024"),
        ({"prune": {"quantise": "int4"}, "export": [{"format": "bitmask-int4", "group": 32}]}, "leave --group out"),
        ({"benchmark": {"prompt": 500}}, "benchmark.prompt plus generate is 532"),
        ({"benchmark": {"runtimes": ["onnxruntime"]}}, "no export runs in onnxruntime on cpu, so nothing would be"),
        ({"export": SEMI}, "pattern unstructured is not 2:4"),
        ({"prune": MIXED, "export": SEMI}, "model.layers.0.mlp.gate_proj: pattern 3:4 is not 2:4"),
        ({"prune": {"overrides": [{"layers": "*.ffn", "pattern": "2:4"}]}}, "override '*.ffn' matches no"),
        (IN_TORCH | {"export": ONNX, "gates": {"max_tpot_ms": 9, "artefact": "onnx"}}, "not timed in onnxruntime or"),
        (ON_CPU | {"benchmark": SHORT, "gates": {"min_decode_speedup": 2, **OF_SEMI}}, "not timed on cpu"),
        (ON_CPU | {"gates": {"max_mean_kl": 1, **OF_SEMI}}, "is not evaluated on cpu"),
        (DENSE_INT8 | IN_TORCH, "no export runs in torch on cpu, so nothing would be timed"),
    ],
)
def test_a_fault_that_shows_before_the_work(keys, message) -> None:
    (fault,) = faults(**keys)
    assert message in fault


def test_what_recovery_has_for_language_models_alone_is_told_before_the_pruning(tmp_path) -> None:
    source = families.written(tmp_path / "bert", "bert")
    found = faults(model=str(source.folder), recover={"sequence_length": 32, "data": ["demo"], "disjoint_from": ["a"]})
    assert any("disjoint_from is for causal language models; " in fault for fault in found)


@pytest.mark.parametrize("model", ["tiny", "owner/model"])
def test_an_allocation_that_may_break_the_pattern_of_an_export(model, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)

    def found(pattern: str, format: str = "semi-structured", allocation: str = "sensitivity", **more) -> list[str]:
        settings = {"pattern": pattern, "allocation": allocation, **more}
        return faults(model=model, prune=settings, export=[{"format": format}])

    assert found("2:4") == [
        "allocation sensitivity changes N of 2:4, but export to semi-structured needs 2:4; give allocation uniform"
    ]
    assert found("2:4", "bitmask") == found("1:4", overrides=[{"layers": "*", "pattern": "2:4"}]) == []
    for pattern in ("2:4", "1:4", "1:2", "2:8"):
        assert found(pattern, allocation="uniform") == []


def test_an_absent_package_or_operator_and_a_float16_checkpoint(tiny, tmp_path, monkeypatch) -> None:
    exports = [{"format": "onnx", "kernels": True}, {"format": "onnx", "kernels": True, "graph": "plain"}]
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "library_file", lambda: None)
        patch.setitem(sys.modules, "lm_eval", None)
        found = faults(evaluate={**PARTS["evaluate"], "tasks": ["piqa"]}, export=exports)
    for said, expected in zip(found, ("operator for ONNX Runtime is missing", "lm-eval, which is not"), strict=True):
        assert expected in said
    monkeypatch.setattr(cpu, "onnxruntime_library", lambda: Path())
    load_model(tiny("llama"), "float16").save_pretrained(tmp_path / "half")
    assert faults(model=str(tmp_path / "half"), export=exports) == []


def test_kernels_auto_means_where_they_were_compiled(tiny, tmp_path, monkeypatch) -> None:
    auto = {"format": "onnx", "kernels": "auto", "quantise": "int8"}
    keys = {"export": [auto, {**auto, "kernels": False}], "benchmark": SHORT}
    gate = {"gates": {"artefact": "onnx-kernels-quantise-int8", "max_bytes": "1GB"}}

    def planned() -> tuple[list[str], list[str]]:
        job = Job(recipe(**keys), tiny("llama"), tmp_path)
        return [stage.name for stage in stages_of(job) if stage.name.startswith("export")], job.notes

    monkeypatch.setattr(cpu, "library_file", Path)
    names = ["export onnx-kernels-quantise-int8", "export onnx-quantise-int8", "export dense-onnx-quantise-int8"]
    assert planned() == (names, []) and faults(**keys, **gate) == []
    monkeypatch.setattr(cpu, "library_file", lambda: None)
    exports, (note,) = planned()
    assert exports == names[1:] and faults(**keys) == [] and outlook(recipe(**keys))["notes"] == [note]
    assert note.startswith("export onnx-quantise-int8 is dense, so zeros save neither bytes nor time; the operator")
    (fault,) = faults(**keys, **gate)
    assert fault == f"gates.artefact 'onnx-kernels-quantise-int8' is not made: {note}"


def test_without_pruning_levels_of_a_float16_model_are_timed_against_float32(tiny, tmp_path) -> None:
    half = ModelSource("half", tmp_path / "half")
    load_model(tiny("llama"), "float16").save_pretrained(half.folder)
    _, baseline, *measured = [stage.name for stage in stages_of(Job(recipe(**DENSE_INT8), half, tmp_path))]
    assert baseline == "export dense-onnx-float32" and measured == ["evaluate onnx-quantise-int8", "benchmark"]
    assert faults(**DENSE_INT8 | IN_TORCH | {"export": [{"format": "int8"}]}) == []


def test_a_pruned_model_is_no_dense_one(pruned) -> None:
    (fault,) = faults(model=str(pruned().folder), prune=None, export=ONNX)
    assert fault.endswith("is pruned, but it is the baseline when prune is null; give the dense model")


def test_exports_that_a_device_cannot_run_are_not_all_that_is_timed(monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.models.loading.choose_device", lambda device: "cuda")
    timed = {"export": [{"format": "onnx", "kernels": True}], "benchmark": SHORT | {"runtimes": ["onnxruntime"]}}
    assert "on cuda, so nothing would be timed" in str(faults(**timed))


def test_a_model_on_the_hub_is_not_fetched_and_that_is_said(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    absent = {"model": "owner/model", "calibration": {"dataset": "c4"}, "export": SEMI}
    (fault,) = faults(**absent)
    assert "prune.pattern: pattern unstructured is not 2:4" in fault
    absent = recipe(**absent)
    assert outlook(absent)["unchecked"] == ["model owner/model", "dataset c4"]
    assert outlook(recipe())["unchecked"] == outlook(recipe(calibration={"dataset": "self"}))["unchecked"] == []
    trained = recipe(recover={"data": ["demo", "owner/texts"], "disjoint_from": ["wikitext2"]})
    assert outlook(trained)["unchecked"] == ["dataset owner/texts", "dataset wikitext2"]


def test_a_hash_of_data_depends_on_its_last_folder_alone(tmp_path: Path) -> None:
    for name in ("cat/a", "cat/b", "dog/c"):
        path = tmp_path / "one" / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    before = data_hash(str(tmp_path / "one" / "images"))
    images = (tmp_path / "one").rename(tmp_path / "other") / "images"
    assert data_hash(str(images)) == before
    (images / "cat" / "b.png").rename(images / "dog" / "b.png")
    assert data_hash(str(images)) != before
