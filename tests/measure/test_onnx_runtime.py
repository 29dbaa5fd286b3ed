"""ONNX graphs that take or give something else than an export: named, whatever of it is different."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gblm_compress.errors import ModelError
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.models.source import ModelSource
from tests.conftest import greedy_tokens

VOCABULARY = 8
TOKENS = ["batch", "tokens"]
IDS = torch.arange(5).unsqueeze(0)


def graph() -> onnx.GraphProto:
    """A model with the interface of an export: the largest logit is the last, whatever the tokens."""
    cache = ["batch", 2, "past", 4]
    return helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["numbers", "last"], ["column"]),
            helper.make_node("MatMul", ["column", "head"], ["scores"]),
            helper.make_node("Add", ["scores", "head"], ["logits"]),
            helper.make_node("Unsqueeze", ["numbers", "both"], ["spread"]),
            helper.make_node("Mul", ["spread", "ones"], ["keys"]),
            helper.make_node("Concat", ["past_key_values.0.key", "keys"], ["present.0.key"], axis=2),
        ],
        "model",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, cache),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY]),
            helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 2, "total", 4]),
        ],
        [
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1, 3]), "both"),
            numpy_helper.from_array(np.arange(VOCABULARY, dtype=np.float32)[None], "head"),
            numpy_helper.from_array(np.ones((1, 2, 1, 4), np.float32), "ones"),
        ],
    )


def runtime(content: onnx.GraphProto, folder: Path) -> OnnxRuntime:
    model = helper.make_model(content, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return OnnxRuntime(ModelSource("handmade", folder), "cpu", 1)


def with_state() -> onnx.GraphProto:
    """The same with the state of a recurrence: the sum of all tokens, which is added to the logits."""
    content = graph()
    state = ["batch", 1, 1]
    content.node[3].output[0] = "raw"
    content.node.extend(
        [
            helper.make_node("ReduceSum", ["column", "second"], ["total"], keepdims=1),
            helper.make_node("Add", ["past_key_values.0.recurrent_state", "total"], ["present.0.recurrent_state"]),
            helper.make_node("Add", ["raw", "present.0.recurrent_state"], ["logits"]),
        ]
    )
    content.initializer.append(numpy_helper.from_array(np.array([1]), "second"))
    for values, stem in ((content.input, "past_key_values"), (content.output, "present")):
        values.append(helper.make_tensor_value_info(f"{stem}.0.recurrent_state", TensorProto.FLOAT, state))
    return content


def renamed(content: onnx.GraphProto, old: str, new: str) -> None:
    for value in (*content.input, *content.output):
        value.name = new if value.name == old else value.name
    for node in content.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def instead(content: onnx.GraphProto, operator: str, numbers: list[int], shape, **keys) -> None:
    """The logits go through one more operator, with the numbers as a second input."""
    renamed(content, "logits", "before")
    (place,) = (value for value in content.output if value.name == "before")
    place.CopyFrom(helper.make_tensor_value_info("logits", keys.get("to", TensorProto.FLOAT), shape))
    if numbers:
        content.initializer.append(numpy_helper.from_array(np.array(numbers), "operand"))
    content.node.append(helper.make_node(operator, ["before", *(["operand"] if numbers else [])], ["logits"], **keys))


def one_more_input(content) -> None:
    content.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["batch", "tokens"]))


def ids_int32(content) -> None:
    content.input[0].type.tensor_type.elem_type = TensorProto.INT32


def heads_symbolic(content) -> None:
    content.input[2].type.tensor_type.shape.dim[1].dim_param = "heads"


def mask_of_four_dimensions(content) -> None:
    dimensions = content.input[1].type.tensor_type.shape.dim
    dimensions.extend(list(dimensions))  # without the copy it would follow its own end


def no_cache(content) -> None:
    content.input.pop()
    del content.output[1], content.node[4:]


def a_fixed_length(content) -> None:
    dimension = content.input[0].type.tensor_type.shape.dim[1]
    dimension.dim_value = 3


def test_a_sound_graph_runs(tmp_path) -> None:
    assert greedy_tokens(runtime(graph(), tmp_path), IDS, 3) == [VOCABULARY - 1] * 3


def test_states_begin_at_zero_and_are_carried_on(tmp_path) -> None:
    model = runtime(with_state(), tmp_path)
    first, cache = model.last_logits(torch.tensor([[1, 2, 3]]), None)
    second, _ = model.last_logits(torch.tensor([[4]]), cache)
    scores = torch.arange(VOCABULARY).float()
    assert torch.equal(first[0], 3 * scores + scores + 6)  # MatMul, Add of the head, and the sum of the tokens
    assert torch.equal(second[0], 4 * scores + scores + 10)


def test_outputs_are_known_by_name(tmp_path) -> None:
    content = graph()
    outputs = list(content.output)
    del content.output[:]
    content.output.extend(reversed(outputs))
    assert greedy_tokens(runtime(content, tmp_path), IDS, 3) == [VOCABULARY - 1] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            partial(renamed, old="input_ids", new="tokens_in"),
            "input 'input_ids' is missing; it has tokens_in, attention_mask",
        ),
        (one_more_input, "input 'token_type_ids' is not known"),
        (ids_int32, r"input 'input_ids' is a tensor\(int32\); tensor\(int64\) is needed"),
        (
            partial(instead, operator="Cast", numbers=[], shape=[*TOKENS, 8], to=TensorProto.DOUBLE),
            r"output 'logits' is a tensor\(double\); tensor\(float\) or tensor\(float16\) is needed",
        ),
        (
            partial(renamed, old="logits", new="scores_out"),
            "output 'logits' is missing; it has scores_out, present.0.key",
        ),
        (
            partial(instead, operator="Reshape", numbers=[-1], shape=["all"]),
            r"output 'logits' has the shape \['all'\]; 3 dimensions",
        ),
        (
            partial(instead, operator="Gather", numbers=[0], shape=["batch", "one", 8], axis=1),
            r"for 1 × 5 tokens up to number 4 output 'logits' has the shape \[1, 1, 8\]",
        ),
        (
            partial(instead, operator="Gather", numbers=[0, 1, 2], shape=[*TOKENS, 3], axis=2),
            r"up to number 4 output 'logits' has the shape \[1, 5, 3\]",
        ),
        (heads_symbolic, r"input 'past_key_values.0.key' has the shape \['batch', 'heads', 'past', 4\]"),
        (mask_of_four_dimensions, "input 'attention_mask' has the shape .*; 2 dimensions are needed"),
        (partial(renamed, old="present.0.key", new="present.0.keys"), "output 'present.0.key' is missing"),
        (no_cache, r"it has no input past_key_values\.\*"),
        (a_fixed_length, "cannot run it .*input_ids"),
    ],
)
def test_another_interface_is_an_error_that_names_it(
    tmp_path, change: Callable[[onnx.GraphProto], None], message: str
) -> None:
    content = graph()
    change(content)
    with pytest.raises(ModelError, match=message):
        runtime(content, tmp_path).predict({"input_ids": IDS})
