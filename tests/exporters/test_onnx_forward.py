"""Graphs of models that generate nothing: what optimum looks for is there, and padded batches come out as in torch."""

import json

import onnx
import pytest
import torch

from gblm_compress.errors import UsageError, VerificationError
from gblm_compress.exporters import export
from gblm_compress.measure import onnx_runtime
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.onnx_runtime import OnnxForward
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
)
from gblm_compress.tasks import TASKS
from tests.tasks import families

TEXT = CalibrationSettings(dataset="demo", samples=4, sequence_length=32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{task: (the pruned folder, its export)} for a BERT that embeds and a DistilBERT that classifies."""
    from gblm_compress.progress import Progress

    progress, found = Progress(quiet=True), {}
    for task, family in (("embedding", "bert"), ("classification", "distilbert")):
        folder = tmp_path_factory.mktemp(task)
        dense = families.written(folder / "dense", family, TASKS[task].auto_class)
        if task == "embedding":
            (dense.folder / "1_Pooling").mkdir()
            (dense.folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
        settings = PruneSettings(method="wanda", fit="none")
        prune(dense, folder / "pruned", settings, TEXT, device="cpu", progress=progress)
        pruned, onnx = (ModelSource(name, folder / name) for name in ("pruned", "onnx"))
        export(pruned, onnx.folder, ExportSettings(format="onnx"), progress=progress)
        found[task] = pruned, onnx
    return found


@pytest.mark.parametrize(
    ("task", "inputs", "output"),
    [
        ("embedding", ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"),
        ("classification", ["input_ids", "attention_mask"], "logits"),
    ],
)
def test_names_are_those_that_optimum_looks_for(exported, task, inputs, output) -> None:
    _, onnx_folder = exported[task]
    graph = onnx.load(onnx_folder.folder / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == inputs and [value.name for value in graph.output] == [output]
    shape = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch_size", "sequence_length"]
    assert not (onnx_folder.folder / "genai_config.json").exists()
    config = json.loads((onnx_folder.folder / "config.json").read_text())
    assert config["architectures"][0].startswith(("BertModel", "DistilBertForSequenceClassification"))


@pytest.mark.parametrize("task", ["embedding", "classification"])
def test_padded_batches_come_out_as_in_torch(exported, task) -> None:
    pruned, onnx_folder = exported[task]
    runtime, reference = OnnxForward(onnx_folder, "cpu", 1), TorchRuntime(loading.load_model(pruned))
    for batch, length in ((1, 3), (5, 40)):
        sample = dict(TASKS[task].timed(loading.config_of(pruned), batch, length, seed=1))
        sample["attention_mask"][-1, length // 2 :] = 0
        expected, got = reference.predict(sample), runtime.predict(sample)
        counted = sample["attention_mask"].bool() if task == "embedding" else slice(None)
        torch.testing.assert_close(got[counted], expected[counted], rtol=1e-4, atol=1e-5)


def test_an_export_is_judged_by_the_pooling_of_its_folder(exported, progress) -> None:
    pruned, onnx_folder = exported["embedding"]
    assert loading.task_of(onnx_folder).pooling == "cls"
    settings = EvaluateSettings(dataset="demo", max_windows=12)
    found = evaluate(onnx_folder, settings, baseline=pruned, device="cpu", progress=progress)
    assert found.provider == "CPUExecutionProvider" and found.fidelity["cosine"] == pytest.approx(1, abs=1e-5)


def test_forward_passes_are_timed_in_both_runtimes(exported, tmp_path, progress) -> None:
    pruned, onnx_folder = exported["classification"]
    packed = ModelSource("packed", tmp_path / "packed")
    export(pruned, packed.folder, ExportSettings(format="bitmask"), progress=progress)
    settings = BenchmarkSettings(batch=(1, 4), prompt=16, repeats=5, warmup=0)
    dense = ModelSource("dense", pruned.folder.parent / "dense")
    found = benchmark([packed], [dense], settings, device="cpu", progress=progress)
    assert [(m.model, m.batch) for m in found.measurements] == [
        ("dense", 1),
        ("packed", 1),
        ("dense", 4),
        ("packed", 4),
    ]
    for m in found.measurements:
        assert m.tpot_ms is m.tokens_per_second is m.decode_kernels is m.decode_speedup is None
        assert m.samples_per_second == pytest.approx(1000 * m.batch / m.ttft_ms.median)
        assert (m.prefill_speedup is None) == (m.model == "dense")
    runtime = OnnxForward(onnx_folder, "cpu", 1, profile=(8,))
    assert any("MatMul" in name or "Gemm" in name for name in runtime.kernels(8))


def test_what_has_no_place_in_such_a_graph_is_refused(exported, tmp_path, progress) -> None:
    pruned, _ = exported["embedding"]
    settings = ExportSettings(format="onnx", kernels=True, quantise="int8")
    with pytest.raises(UsageError, match="quantise is for causal language models"):
        export(pruned, tmp_path / "out", settings, progress=progress)


def test_a_wrong_prediction_fails_verification(exported, tmp_path, monkeypatch, progress) -> None:
    pruned, _ = exported["embedding"]
    original = onnx_runtime.OnnxForward.predict
    monkeypatch.setattr(OnnxForward, "predict", lambda self, sample: 1.01 * original(self, sample))
    with pytest.raises(VerificationError, match="differ by"):
        export(pruned, tmp_path / "out", ExportSettings(format="onnx"), progress=progress)
    assert not (tmp_path / "out").exists()
