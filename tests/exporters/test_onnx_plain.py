"""Plain graphs beside decoders: one forward pass, as optimum reads it, and recurrences with a limit of tokens."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.exporters.onnx_plain import note_limit
from gblm_compress.measure.benchmarking import Contest, benchmark
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.onnx_runtime import AT_ONCE, OnnxForward, OnnxRuntime
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models import loading, manifest
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import BenchmarkSettings, ComputeSettings, EvaluateSettings, PruneSettings
from gblm_compress.tasks import TASKS
from tests.conftest import export, prune
from tests.exporters.test_onnx import needs_operator
from tests.measure.test_onnx_runtime import CONCAT, PAST, PRESENT, runtime
from tests.scripts import ROOT, python
from tests.tasks import families


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{task: (the pruned folder, its export)} for a BERT that embeds and a DistilBERT that classifies."""
    found = {}
    for task, family in (("embedding", "bert"), ("classification", "distilbert")):
        folder = tmp_path_factory.mktemp(task)
        dense = families.written(folder / "dense", family, TASKS[task].auto_class)
        if task == "embedding":
            (dense.folder / "1_Pooling").mkdir()
            (dense.folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
        prune(dense, folder / "pruned", PruneSettings(method="magnitude", fit="none"))
        pruned = ModelSource("pruned", folder / "pruned")
        found[task] = pruned, export(pruned, folder / "onnx", format="onnx")[1]
    return found


@pytest.mark.parametrize(
    ("task", "inputs", "output"),
    [
        ("embedding", ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"),
        ("classification", ["input_ids", "attention_mask"], "logits"),
    ],
)
def test_names_are_optimums_and_padded_batches_come_out_as_in_torch(exported, task, inputs, output) -> None:
    pruned, onnx_folder = exported[task]
    graph = onnx.load(onnx_folder.folder / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == inputs and [value.name for value in graph.output] == [output]
    shape = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch_size", "sequence_length"]
    assert not (onnx_folder.folder / "genai_config.json").exists()
    config = json.loads((onnx_folder.folder / "config.json").read_text())
    assert config["architectures"][0].startswith(("BertModel", "DistilBertForSequenceClassification"))
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
    packed = export(pruned, tmp_path / "packed", format="bitmask")[1]
    settings = BenchmarkSettings(batch=(1, 4), prompt=16, repeats=5, warmup=0)
    dense = ModelSource("dense", pruned.folder.parent / "dense")
    found = benchmark(Contest([packed], [dense], settings, ComputeSettings(device="cpu")), progress)
    timed = [(m.model, m.batch) for m in found.measurements]
    assert timed == [(name, batch) for batch in (1, 4) for name in ("dense", "packed")]
    for m in found.measurements:
        assert m.tpot_ms is m.tokens_per_second is m.decode_kernels is m.decode_speedup is None
        assert m.samples_per_second == pytest.approx(1000 * m.batch / m.ttft_ms.median)
        assert (m.prefill_speedup is None) == (m.model == "dense")
    runtime = OnnxForward(onnx_folder, "cpu", 1, profile=(8,))
    assert any("MatMul" in name or "Gemm" in name for name in runtime.kernels(8))


@pytest.mark.parametrize(("quantise", "operator"), [("int8", "DynamicQuantizeMatMul"), ("int4", "MatMulNBits")])
def test_forward_passes_in_fewer_bits(exported, tmp_path, quantise: str, operator: str) -> None:
    pruned, full = exported["embedding"]
    result, rounded = export(pruned, tmp_path / "out", format="onnx", quantise=quantise)
    assert result.checks["logits_relative_difference"] < 0.1 and result.checks["layers_checked"] > 0
    graph = onnx.load(rounded.folder / "model.onnx", load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    assert operator in {node.op_type for node in graph.node}
    assert not stored & {f"{name}.weight" for name in manifest.read(pruned.folder)["layers"]}
    sample = loading.task_of(pruned).probe(loading.load_processor(pruned), loading.config_of(pruned))
    got, exact = (OnnxForward(folder, "cpu", 1).predict(sample) for folder in (rounded, full))
    assert 0 < float((got - exact).abs().max()) < 0.5 * float(exact.abs().max())
    assert result.bytes < 0.75 * full.bytes_on_disk
    with pytest.raises(UsageError, match="group would do nothing: int8 of a model without decoding has a scale for"):
        export(pruned, tmp_path / "out", format="onnx", quantise="int8", group=32)


@needs_operator
def test_an_example_packs_graphs_of_other_tools(exported, tmp_path) -> None:
    script, packed = ROOT / "docs" / "examples" / "pack_onnx.py", tmp_path / "packed.onnx"
    assert "written to" in python(script, exported["embedding"][1].folder / "model.onnx", packed).stdout
    assert "BitmaskLinear" in {node.op_type for node in onnx.load(packed).graph.node}
    assert "nothing to pack" in python(script, packed, tmp_path / "again.onnx", code=1).stderr


IDS = torch.arange(300).remainder(7).unsqueeze(0)
STATE = {
    PAST: f'{PAST}, float[batch, 1, 1] "past_key_values.0.recurrent_state"',
    PRESENT: f'{PRESENT}, float[batch, 1, 1] "present.0.recurrent_state"',
    "logits = Add (scores, head)": """raw = Add (scores, head)
    second = Constant <value_ints = [1]> ()
    sum = ReduceSum <keepdims = 1> (column, second)
    "present.0.recurrent_state" = Add ("past_key_values.0.recurrent_state", sum)
    logits = Add (raw, "present.0.recurrent_state")""",
}


def limited(tokens: int) -> dict[str, str]:
    """A graph with the state of a recurrence that fails for more tokens: it makes a tensor of those that are left."""
    nodes = f"""most = Constant <value_ints = [{tokens}]> ()
    tokens_axis = Constant <value_ints = [1]> ()
    sizes = Shape (input_ids)
    given = Gather (sizes, tokens_axis)
    left = Sub (most, given)
    padding = ConstantOfShape (left)"""
    return STATE | {PRESENT: f"{STATE[PRESENT]}, float[left] padding", CONCAT: f"{CONCAT}\n    {nodes}"}


@pytest.mark.parametrize("tokens", [16, 256])
def test_a_limit_is_found_and_longer_texts_are_read_in_parts(tmp_path: Path, tokens: int) -> None:
    expected = runtime(STATE, tmp_path).predict({"input_ids": IDS})
    runtime(limited(tokens), tmp_path)
    assert note_limit(tmp_path, "handmade") == tokens
    limit = {prop.key: prop.value for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert limit == {AT_ONCE: str(tokens)}
    again = OnnxRuntime(ModelSource("handmade", tmp_path), "cpu", 1)
    got = again.predict({"input_ids": IDS})
    # The state is that of all tokens of a call; after the last call it is that of the whole text.
    assert got.shape == expected.shape
    assert torch.equal(got[0, -1], expected[0, -1])
    # A benchmark's profile of so many tokens counts the operators of all their calls.
    profiled = OnnxRuntime(ModelSource("handmade", tmp_path), "cpu", 1, profile=[1, tokens, 2 * tokens + 1])
    once, more = profiled.kernels(tokens), profiled.kernels(2 * tokens + 1)
    assert once == profiled.kernels(1) and more == {operator: 3 * count for operator, count in once.items()}
    assert profiled.step_ms


def test_a_graph_without_limit_is_left_alone_and_what_is_none_refused(tmp_path: Path) -> None:
    runtime(STATE, tmp_path)
    before = (tmp_path / "model.onnx").read_bytes()
    assert note_limit(tmp_path, "handmade") is None
    assert (tmp_path / "model.onnx").read_bytes() == before
    content = onnx.load(tmp_path / "model.onnx")
    content.metadata_props.add(key=AT_ONCE, value="0 or so")
    onnx.save(content, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"metadata 'gblm_tokens_at_once' is '0 or so'; a number of tokens is needed"):
        OnnxRuntime(ModelSource("handmade", tmp_path), "cpu", 1)
    runtime(limited(2), tmp_path)
    with pytest.raises(ModelError, match=r"'handmade': tracing keeps a fixed number of steps.*sparse PyTorch"):
        note_limit(tmp_path, "handmade")
