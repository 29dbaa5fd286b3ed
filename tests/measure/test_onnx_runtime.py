"""ONNX graphs that take or give something else than an export: named, whatever of it is different."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx.parser import parse_model

from gblm_compress.errors import ModelError
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.models.source import ModelSource
from tests.conftest import greedy_tokens

IDS = torch.arange(5).unsqueeze(0)
PAST, PRESENT = 'float[batch, 2, past, 4] "past_key_values.0.key"', 'float[batch, 2, total, 4] "present.0.key"'
LOGITS = "float[batch, tokens, 8] logits"
CONCAT = '"present.0.key" = Concat <axis = 2> ("past_key_values.0.key", keys)'
# The interface of an export; the largest logit is the last, whatever the tokens.
SOUND = f"""
<ir_version: 9, opset_import: ["" : 18]>
model (int64[batch, tokens] input_ids, int64[batch, total] attention_mask, {PAST})
    => ({LOGITS}, {PRESENT})
    <int64[1] first = {{0}}, int64[1] last = {{-1}}, int64[3] three = {{0, 1, 2}},
     int64[2] both = {{1, 3}}, float[1, 8] head = {{0, 1, 2, 3, 4, 5, 6, 7}},
     float[1, 2, 1, 4] ones = {{1, 1, 1, 1, 1, 1, 1, 1}}>
{{
    numbers = Cast <to = 1> (input_ids)
    column = Unsqueeze (numbers, last)
    scores = MatMul (column, head)
    logits = Add (scores, head)
    spread = Unsqueeze (numbers, both)
    keys = Mul (spread, ones)
    {CONCAT}
}}
"""


def runtime(changes: dict[str, str], folder: Path) -> OnnxRuntime:
    text = SOUND
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    onnx.save(parse_model(text), folder / "model.onnx")
    return OnnxRuntime(ModelSource("handmade", folder), "cpu", 1)


def logits(output: str, operator: str) -> dict[str, str]:
    """The logits go through one more operator, and are declared as `output`."""
    added = f"raw = Add (scores, head)\n logits = {operator}"
    return {LOGITS: f"{output} logits", "logits = Add (scores, head)": added}


@pytest.mark.parametrize("changes", [{}, {f"{LOGITS}, {PRESENT}": f"{PRESENT}, {LOGITS}"}], ids=["usual", "reversed"])
def test_a_sound_graph_runs_and_its_outputs_are_known_by_name(tmp_path, changes: dict[str, str]) -> None:
    assert greedy_tokens(runtime(changes, tmp_path), IDS, 3) == [7] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": "tokens_in"}, "input 'tokens_in' of .* is not known"),
        ({"int64[batch, tokens]": "int32[batch, tokens]"}, "cannot run it .*int32"),
        (logits("double[batch, tokens, 8]", "Cast <to = 11> (raw)"), "no output 'logits' of floating-point numbers"),
        (logits("float[all]", "Reshape (raw, last)"), r"output 'logits' has the shape \[40\]"),
        (logits("float[batch, one, 8]", "Gather <axis = 1> (raw, first)"), r"has the shape \[1, 1, 8\]"),
        (logits("float[batch, tokens, 3]", "Gather <axis = 2> (raw, three)"), r"has the shape \[1, 5, 3\]"),
        ({"2, past": "heads, past"}, r"'past_key_values.0.key' of .*\['batch', 'heads', 'past', 4\] is not known"),
        ({"present.0.key": "present.0.keys"}, "input 'past_key_values.0.key' of .* is not known"),
        ({f", {PAST}": "", f", {PRESENT}": "", CONCAT: ""}, r"it has no input past_key_values\.\*"),
    ],
)
def test_another_interface_is_an_error_that_names_it(tmp_path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        runtime(changes, tmp_path).predict({"input_ids": IDS})
