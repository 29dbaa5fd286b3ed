"""Weights as levels of 8 or 4 bits, for ONNX exports: a model's own weights become the points that are stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress.exporters.onnx_nbits import GROUP, Blocks
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.architecture import as_matrix, prunable_layers, weight_matrix
from gblm_compress.models.grids import read_grids
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import ExportSettings

WIDTHS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Rounded:
    """The weights of a model that was rounded.

    Attributes:
        layers: {layer: its packed weight}.
        tables: those of head and embedding, in 8 bits.
        moved: {layer: what share of it rounding moved}.
    """

    layers: dict[str, Any]
    tables: list[Any]
    moved: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """How much rounding moved, for the result."""
        much = [name for name, share in self.moved.items() if share > self.layers[name].largest_error]
        return {"largest_rounding_error": max(self.moved.values()), **({"layers_rounded_much": much} if much else {})}


def round_(model: nn.Module, source: ModelSource, settings: ExportSettings, *, is_dense: bool) -> Rounded:
    """Round all linear layers of the blocks, head and embedding in place: to the layout of this package's operators,
    or else to blocks of ONNX Runtime.

    Args:
        is_dense: the model was never pruned.
    """
    if not settings.kernels:
        bits, group = WIDTHS[settings.quantise or ""], settings.group or GROUP
        layers, moved = _round_layers_(model, lambda _, weight: Blocks.from_dense(weight, bits, group))
        return Rounded(layers, _round_tables_(model, lambda weight: Blocks.from_dense(weight, 8, group)), moved)
    grids = read_grids(source)
    layout = "int8" if is_dense and settings.quantise == "int8" else f"bitmask-{settings.quantise}"
    kind: Any = LAYOUTS[layout].kind
    tables = LAYOUTS[layout].tables or ""

    def pack(name: str, weight: Tensor) -> Any:
        grid = grids.get(name) if kind.holds(grids.get(name)) else None
        return PackedLinear.from_dense(layout, weight, group=settings.group, grid=grid)

    layers, moved = _round_layers_(model, pack)
    return Rounded(layers, _round_tables_(model, lambda weight: PackedLinear.from_dense(tables, weight)), moved)


@torch.no_grad()
def _round_layers_(model: nn.Module, pack: Callable[[str, Tensor], Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Args:
    pack: of a layer's name and its weight [out_features, in_features] in float32: its packed form.

    Returns:
        {layer: its packed weight}, and {layer: what share of it rounding moved}.
    """
    packed, moved = {}, {}
    layers: dict[str, Any] = {name: layer for block in prunable_layers(model) for name, layer in block.items()}
    for name, layer in layers.items():
        packed[name] = pack(name, weight_matrix(layer).float())
        moved[name] = packed[name].error(weight_matrix(layer))
        layer.weight.copy_(as_matrix(layer, packed[name].dense_weight()))
    return packed, moved


@torch.no_grad()
def _round_tables_(model: Any, pack: Callable[[Tensor], Any]) -> list[Any]:
    """The packed weights of head and embedding; one where they are tied."""
    packed: dict[int, Any] = {}
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        weight = None if module is None else module.weight
        if weight is not None and weight.data_ptr() not in packed:
            packed[weight.data_ptr()] = pack(weight.float())
            weight.copy_(packed[weight.data_ptr()].dense_weight())
    return list(packed.values())
