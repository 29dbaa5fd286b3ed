"""Where the linear layers of a model are in the initializers of an ONNX graph."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from torch import nn

from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.architecture import prunable_layers, weight_matrix

Packed = TypeVar("Packed", bound=PackedLinear)


@dataclass(frozen=True)
class Place:
    """Columns [start, stop) of an initializer [in_features, columns], or a whole one in either orientation.

    Attributes:
        shape: of the whole initializer.
    """

    initializer: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def of(self, array: Any) -> Any:
        """The layer's elements of the initializer."""
        return array[:, self.start : self.stop]


def find(program: ir.Model, model: nn.Module) -> dict[str, Place]:
    """Recognise every linear weight by its content, bit for bit: alone, transposed, or side by side with others in one
    initializer. An initializer of one layer is renamed after it; some exporters number them.

    Returns:
        {layer: its place}; without the layers that are nowhere.
    """
    by_content: dict[bytes, str] = {}
    by_row: dict[bytes, list[tuple[str, Any]]] = {}
    for name, layer in ((n, layer) for block in prunable_layers(model) for n, layer in block.items()):
        weight = weight_matrix(layer).detach().numpy()
        for array in (weight, weight.T):
            by_content.setdefault(_content(array), name)
        by_row.setdefault(_content(weight[0]), []).append((name, weight))
    found: dict[str, Place] = {}
    for value in list(program.graph.initializers.values()):
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        array = value.const_value.numpy()
        whole = by_content.get(_content(array))
        if whole is None:
            found |= _side_by_side(value.name or "", array, by_row)
        elif whole not in found:
            program.graph.initializers.pop(value.name)
            value.name = f"{whole}.weight"
            program.graph.initializers[value.name] = value
            found[whole] = Place(value.name, array.shape, 0, array.shape[1])
    return found


def stacked(packed: Mapping[str, Packed], places: Mapping[str, Place]) -> dict[str, Packed]:
    """The packed weights of layers, one below the other as they lie side by side in an initializer: {initializer: …}.

    Args:
        packed: {layer: its weight}; of the layers of an initializer all or none.
    """
    together: dict[str, list[str]] = {}
    for layer in sorted((layer for layer in packed if layer in places), key=lambda layer: places[layer].start):
        together.setdefault(places[layer].initializer, []).append(layer)
    parts = {name: [packed[layer] for layer in layers] for name, layers in together.items()}
    return {name: own[0] if len(own) == 1 else own[0].stack(own) for name, own in parts.items()}


def _side_by_side(name: str, array: Any, by_row: dict[bytes, list[tuple[str, Any]]]) -> dict[str, Place]:
    """The layers whose weights [out_features, in_features] are, transposed and side by side, `array`."""
    found, start = {}, 0
    while start < array.shape[1]:
        for layer, weight in by_row.get(_content(array[:, start]), ()):
            stop = start + len(weight)
            if layer not in found and weight.shape[1] == len(array) and np.array_equal(weight.T, array[:, start:stop]):
                found[layer] = Place(name, array.shape, start, stop)
                start = stop
                break
        else:
            return {}
    return found


def _content(array: Any) -> bytes:
    shape = repr(array.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).digest()
