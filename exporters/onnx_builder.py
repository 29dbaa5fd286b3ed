"""Runs onnxruntime-genai's model builder on a model without weights; `onnx_fused` starts it as a process.

In place of its weight, each linear layer and embedding has one row of bytes, repeated, which is its number. So the
builder takes little memory and no disk for weights, and its graph tells where each one went. `PARTS` says that.
"""

import json
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from gblm_compress.models.files import SINGLE

# A file beside the graph: {initializer: {"rows": {layer: how many rows it has of it}, "turned": whether it is turned}}.
PARTS = "parts.json"
_BYTE = torch.float8_e4m3fn  # The builder wants floating point. It holds whole numbers up to 16.
_MARK, _DIGITS = 15, 5  # A number is a mark and its digits.
_layers: dict[str, int] = {}  # rows of each layer, in order of their numbers
_save = ir.save


def numbered(folder: str, **_: Any) -> Any:
    """The model of a folder that has all parameters but matrices."""
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.tie_weights()
    model.load_state_dict(load_file(Path(folder) / SINGLE), strict=False, assign=True)
    numbers: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        if id(weight) not in numbers:
            row = torch.zeros(weight.shape[1])
            row[: 1 + _DIGITS] = torch.tensor([_MARK, *map(int, f"{len(_layers):0{_DIGITS}}")])
            numbers[id(weight)] = nn.Parameter(row.to(_BYTE).expand(weight.shape), requires_grad=False)
            _layers[name] = len(weight)
        module.weight = numbers[id(weight)]
    return model.eval()


def save_without_matrices(program: Any, path: str, **_: Any) -> None:
    """Write the graph, which names a missing file for its matrices, and `PARTS`. Each layer must be found again."""
    parts = {}
    for name, value in program.graph.initializers.items():
        if len(value.shape) == 2 and (made_of := parts_of(value.const_value.numpy())):
            parts[name] = made_of
            value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=name)
    found = {name: rows for made_of in parts.values() for name, rows in made_of["rows"].items()}
    if changed := [name for name, rows in _layers.items() if found.get(name) != rows]:
        raise SystemExit(f"it changes the weight of {changed[0]}")
    _save(program, path)
    Path(path).with_name(PARTS).write_text(json.dumps(parts))


def parts_of(array: Any) -> dict[str, Any] | None:
    """The layers whose numbers are all that is in a matrix."""
    for turned, rows in ((True, array.T), (False, array)):
        if (rows[:, 0] == _MARK).all() and not rows[:, 1 + _DIGITS :].any():
            numbers = (rows[:, 1 : 1 + _DIGITS] @ 10.0 ** np.arange(_DIGITS)[::-1]).astype(int)
            ends, names = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)], list(_layers)
            return {"turned": turned, "rows": {names[numbers[a]]: int(b - a) for a, b in pairwise(ends)}}
    return None


def main() -> None:
    """Run the builder with the arguments of this process."""
    transformers.AutoModelForCausalLM.from_pretrained = numbered
    ir.save = save_without_matrices
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


if __name__ == "__main__":
    main()
