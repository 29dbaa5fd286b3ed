"""Plain ONNX graphs, and what all graphs share: verification accepts what is true and refuses what is not."""

import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from gblm_compress.errors import MissingDependencyError, ModelError, VerificationError
from gblm_compress.exporters import onnx as exporter
from gblm_compress.exporters import onnx_packing, onnx_plain, onnx_verification
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from tests.conftest import export

PLAIN = {"format": "onnx", "graph": "plain"}

needs_operator = pytest.mark.skipif(cpu.library_file() is None, reason="installed without a C compiler")


@pytest.fixture(autouse=True, scope="module")
def _each_model_is_traced_once() -> Iterator[None]:
    trace, traced = onnx_plain._trace, dict[tuple[ModelSource, torch.dtype], bytes]()

    def once(model, source):
        if (source, model.dtype) not in traced:
            traced[source, model.dtype] = ir.to_proto(trace(model, source)).SerializeToString()
        return ir.from_proto(onnx.load_from_string(traced[source, model.dtype]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_plain, "_trace", once)
        yield


@pytest.fixture(scope="module")
def exported(pruned, tmp_path_factory):
    """A tiny Llama, pruned 2:4 and exported in float32."""
    result, folder = export(pruned("llama", "2:4"), tmp_path_factory.mktemp("onnx") / "onnx", **PLAIN)
    return pruned("llama", "2:4"), folder, result


@pytest.fixture(scope="module")
def with_kernels(exported, tmp_path_factory):
    return export(exported[0], tmp_path_factory.mktemp("kernels") / "out", **PLAIN, kernels=True)


def test_names_and_dynamic_dimensions(exported) -> None:
    _, folder, _ = exported
    onnx.checker.check_model(str(folder.folder / "model.onnx"))
    assert b"site-packages" not in (folder.folder / "model.onnx").read_bytes()  # paths of this machine
    graph = onnx.load(folder.folder / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output)
    }
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    past, total = (("batch_size", 2, f"{what}_sequence_length", 16) for what in ("past", "total"))
    assert shapes == {
        **dict.fromkeys(("input_ids", "position_ids"), ("batch_size", "sequence_length")),
        "attention_mask": ("batch_size", "total_sequence_length"),
        "logits": ("batch_size", "sequence_length", 257),
        **dict.fromkeys([f"past_key_values.{part}" for part in parts], past),
        **dict.fromkeys([f"present.{part}" for part in parts], total),
    }
    decoder = json.loads((folder.folder / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    assert {"input_ids", "attention_mask", "position_ids"} < decoder["inputs"].keys()


def assert_computes(folder: ModelSource, model: nn.Module) -> None:
    """Whether a graph gives the logits of the model, for prompts, and for steps, which must see the cache."""
    reference, runtime = TorchRuntime(model), OnnxRuntime(folder, "cpu", 2)
    for batch in (1, 3):
        ids = torch.randint(0, 257, (batch, 70), generator=torch.Generator().manual_seed(0))
        expected = reference.predict({"input_ids": ids})
        torch.testing.assert_close(runtime.predict({"input_ids": ids}), expected, rtol=1e-4, atol=1e-4)
        logits, cache = runtime.last_logits(ids[:, :60], None)
        for t in range(60, 70):
            torch.testing.assert_close(logits, expected[:, t - 1], rtol=1e-4, atol=1e-4)
            logits, cache = runtime.last_logits(ids[:, t : t + 1], cache)


def test_prefill_and_decode_with_any_batch_and_length(exported) -> None:
    assert_computes(exported[1], load_model(exported[0]))


def test_padding_is_masked(exported) -> None:
    """A left-padded sequence gives the logits of the sequence alone: `attention_mask` is not ignored."""
    source, folder, _ = exported
    session = onnxruntime.InferenceSession(folder.folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids, mask, positions = (np.array([[0, 0, 0, *rest]]) for rest in ((65, 66, 67), (1, 1, 1), (0, 1, 2)))
    empty = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
    padded = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty})[0]
    with torch.no_grad():
        alone = load_model(source)(input_ids=torch.tensor([[65, 66, 67]])).logits
    np.testing.assert_allclose(padded[:, 3:], alone.numpy(), rtol=1e-3, atol=1e-3)


def test_another_architecture_in_float16(tiny, tmp_path) -> None:
    result, folder = export(tiny("qwen3"), tmp_path / "out", **PLAIN, dtype="float16")
    assert OnnxRuntime(folder, "cpu", 1).dtype == "float16"
    assert result.checks["identical_greedy_tokens"] >= result.checks["decided_greedy_tokens"] > 0


@needs_operator
def test_a_runtime_that_refuses_the_operators_is_named(with_kernels, monkeypatch) -> None:
    refuse = Mock(side_effect=RuntimeError("gblm: needs ONNX Runtime 1.17 or newer"))
    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", refuse)
    monkeypatch.setattr(onnxruntime, "__version__", "1.16.3")
    with pytest.raises(MissingDependencyError, match=r"^ONNX Runtime 1\.16\.3 .* \(gblm: needs .* install a newer"):
        OnnxRuntime(with_kernels[1], "cpu", 1)


@needs_operator
def test_a_damaged_graph_is_an_error_of_the_model(with_kernels, tmp_path) -> None:
    model = onnx.load(with_kernels[1].folder / "model.onnx")
    starts = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".starts"))
    starts.CopyFrom(onnx.numpy_helper.from_array(np.zeros(starts.dims, np.int64), starts.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"cannot load it .*starts 'model\.layers\.\d.*\.starts' says 0 at row 1;"):
        OnnxRuntime(ModelSource("damaged", tmp_path), "cpu", 1)


def test_without_a_compiler_kernels_are_refused_and_auto_is_dense_and_says_so(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "library_file", lambda: None)
    with pytest.raises(MissingDependencyError, match="no C compiler was at hand.*apt install gcc"):
        export(exported[0], tmp_path / "out", **PLAIN, kernels=True)
    result, folder = export(exported[0], tmp_path / "out", **PLAIN, kernels="auto")
    assert "export onnx-graph-plain is dense" in result.checks["note"] and "apt install gcc" in result.checks["note"]
    assert result.bytes == exported[2].bytes and not (folder.folder / exporter.LIBRARY).exists()


@needs_operator
def test_kernels_take_whole_words(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_packing, "WORD", 48)
    with pytest.raises(ModelError, match="multiple of 48; this weight has in_features=64 .* Export without --kernels"):
        export(exported[0], tmp_path / "out", **PLAIN, kernels=True)
    monkeypatch.setattr(exporter, "WORD", 48)
    monkeypatch.setattr(onnx_plain, "_trace", None)
    with pytest.raises(ModelError, match="not a multiple of 48, which kernels need"):  # before the model is traced
        export(exported[0], tmp_path / "out", **PLAIN, kernels=True)


def test_packed_initializers_are_decoded_and_damaged_ones_are_errors() -> None:
    weight = torch.tensor([[0.0, 5.0], [7.0, 0.0]]).repeat(1, 32)
    mask, values = LAYOUTS["bitmask"].kind.pack(weight).values()

    def decoded(**stored):
        initializers = {f"w.{name}": ir.Value(const_value=ir.tensor(array.numpy())) for name, array in stored.items()}
        return onnx_verification.decode(initializers, "w", (64, 2))

    assert np.array_equal(decoded(mask=mask, nonzeros=values), weight.T)
    for damage in ({"mask": mask.float()}, {"nonzeros": values[:-1]}):
        with pytest.raises(ModelError):
            decoded(**{"mask": mask, "nonzeros": values} | damage)


def test_memory_that_runs_out_is_no_fault_of_the_model(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        export(exported[0], tmp_path / "out", **PLAIN)
    assert not list(tmp_path.iterdir())


def forgetful(last_logits: Callable[..., Any]) -> Callable[..., Any]:
    """Prompts are read right, but what a decode step adds to the cache is lost."""

    def decode(self, ids, cache):
        logits, grown = last_logits(self, ids, cache)
        return logits, grown if cache is None else cache

    return decode


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "message"),
    [
        (OnnxRuntime, "predict", lambda _, sample: torch.zeros(*sample["input_ids"].shape, 257), "and torch differ"),
        (onnx_plain, "find", lambda *_: {}, "no initializer of the graph holds its weight"),
        (onnx_verification, "decode", lambda *_: np.ones((1, 1)), r"zeros in the model, 0 in the graph's initializer"),
        (OnnxRuntime, "last_logits", forgetful(OnnxRuntime.last_logits), "largest logit on 32 tokens decoded one by"),
    ],
)
def test_wrong_logits_lost_zeros_and_a_wrong_cache_fail_verification(
    exported, tmp_path, monkeypatch, owner, name, wrong, message
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(VerificationError, match=message):
        export(exported[0], tmp_path / "out", **PLAIN)
    assert not list(tmp_path.iterdir())


def test_few_tokens_may_differ_where_inputs_are_rounded_and_none_where_they_are_not(exported, tmp_path, monkeypatch):
    predict, options = OnnxRuntime.predict, {"format": "onnx", "quantise": "int4"}

    def of_call(number: int, tokens: int) -> None:
        """Let the predictions of that call, first unrounded, then rounded, be wrong for so many tokens."""
        calls = iter(range(9))

        def wrong(runtime, sample):
            logits = predict(runtime, sample)
            logits[0, :tokens] += (next(calls) == number) * logits.abs().max()
            return logits

        monkeypatch.setattr(OnnxRuntime, "predict", wrong)

    of_call(1, tokens=1)
    assert export(exported[0], tmp_path / "out", **options)[0].checks["logits_relative_difference"] < 0.1
    for number, tokens, dtype in ((0, 1, "blocks"), (1, 9, "inputs of 8 bits")):
        of_call(number, tokens)
        with pytest.raises(VerificationError, match=f"tokens read at once; 1e-0[13] is allowed in {dtype}"):
            export(exported[0], tmp_path / "other", **options)


def test_a_near_tie_is_no_fault_but_one_token_must_be_decided(exported, tmp_path, monkeypatch) -> None:
    """Either of two logits that are nearly equal may be the larger one."""
    expected = 0.9 * torch.rand(32, 257, generator=torch.Generator().manual_seed(0))
    expected[:, 0], expected[1::2, 1] = 1.005, 1.0
    got = expected + 5e-3
    got[1::2, 1] += 7e-3
    monkeypatch.setattr(onnx_verification, "_decoded", lambda *_: (expected, got))
    monkeypatch.setitem(onnx_verification.TOLERANCE, "float32", 2e-2)
    checks = export(exported[0], tmp_path / "out", **PLAIN)[0].checks
    assert checks["decided_greedy_tokens"] == checks["identical_greedy_tokens"] == 16
    expected[:, 1], got[:, 1] = 1.0, 1.012
    with pytest.raises(VerificationError, match="too much to decide any of 32 tokens"):
        export(exported[0], tmp_path / "refused", **PLAIN)
