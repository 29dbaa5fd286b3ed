"""Graphs that read a limited number of tokens at once, as tracing leaves those of recurrences."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gblm_compress.errors import ModelError
from gblm_compress.exporters.onnx_plain import note_limit
from gblm_compress.measure.onnx_runtime import AT_ONCE, OnnxRuntime
from gblm_compress.models.source import ModelSource
from tests.measure.test_runtimes import runtime, with_state

IDS = torch.arange(300).remainder(7).unsqueeze(0)


def limited(tokens: int) -> onnx.GraphProto:
    """A graph with the state of a recurrence that fails for more tokens: it makes a tensor of those that are left."""
    content = with_state()
    content.initializer.extend(
        [numpy_helper.from_array(np.array([tokens]), "most"), numpy_helper.from_array(np.array([1]), "first")]
    )
    content.node.extend(
        [
            helper.make_node("Shape", ["input_ids"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "first"], ["given"]),
            helper.make_node("Sub", ["most", "given"], ["left"]),
            helper.make_node("ConstantOfShape", ["left"], ["padding"]),
        ]
    )
    content.output.append(helper.make_tensor_value_info("padding", TensorProto.FLOAT, ["left"]))
    return content


@pytest.mark.parametrize("tokens", [16, 256])
def test_a_limit_is_found_and_longer_texts_are_read_in_parts(tmp_path: Path, tokens: int) -> None:
    expected = runtime(with_state(), tmp_path).predict({"input_ids": IDS})
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
    assert profiled.step_ms()


def test_graphs_without_limit_are_left_alone(tmp_path: Path) -> None:
    runtime(with_state(), tmp_path)
    before = (tmp_path / "model.onnx").read_bytes()
    assert note_limit(tmp_path, "handmade") is None
    assert (tmp_path / "model.onnx").read_bytes() == before


def test_a_recurrence_of_a_fixed_number_of_tokens_is_refused(tmp_path: Path) -> None:
    runtime(limited(2), tmp_path)
    with pytest.raises(ModelError, match=r"'handmade': tracing keeps a fixed number of steps.*sparse PyTorch"):
        note_limit(tmp_path, "handmade")


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path) -> None:
    runtime(with_state(), tmp_path)
    content = onnx.load(tmp_path / "model.onnx")
    content.metadata_props.add(key=AT_ONCE, value="0 or so")
    onnx.save(content, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"metadata 'gblm_tokens_at_once' is '0 or so'; a number of tokens is needed"):
        OnnxRuntime(ModelSource("handmade", tmp_path), "cpu", 1)
