"""Weights as levels of 8 or 4 bits, for exports: a model's own weights become the points that are stored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gblm_compress.errors import UsageError
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.quantised import QuantisedLinear
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models.architecture import as_matrix, prunable_layers, weight_matrix
from gblm_compress.models.grids import read_grids
from gblm_compress.models.source import ModelSource


def check_group(source: ModelSource | None, group: int | None) -> None:
    """Raises:
    UsageError: a group is asked for, and the model's weights lie on grids already.
    ModelError: its grids are damaged.
    """
    if source is not None and group is not None and (grids := read_grids(source)):
        own = next(iter(grids.values())).group
        raise UsageError(f"group {group}: the model was pruned onto grids of {own or 'whole rows'}; leave --group out")


@torch.no_grad()
def round_layers_(
    model: nn.Module, layout: str, grids: Mapping[str, Grid], group: int | None
) -> tuple[dict[str, QuantisedLinear], dict[str, float]]:
    """Round all linear layers of the blocks, in place.

    Args:
        layout: a quantised one of `LAYOUTS`.
        grids: {layer: where its weights lie already}; a grid of more levels than the layout has is made anew.
        group: columns that share a scale, where grids are made; the layout's own if unset.

    Returns:
        {layer: its packed weight}, and {layer: what share of it rounding moved}.
    """
    kind: Any = LAYOUTS[layout].layer
    packed, moved = {}, {}
    layers: dict[str, Any] = {name: layer for block in prunable_layers(model) for name, layer in block.items()}
    for name, layer in layers.items():
        grid = grids.get(name) if kind.holds(grids.get(name)) else None
        packed[name] = kind.from_dense(weight_matrix(layer).float(), None, group=group, grid=grid)
        moved[name] = packed[name].error(weight_matrix(layer))
        layer.weight.copy_(as_matrix(layer, packed[name].dense_weight()))
    return packed, moved


@torch.no_grad()
def round_tables_(model: Any, layout: str) -> list[QuantisedLinear]:
    """Round head and embedding, in place; one weight where they are tied.

    Args:
        layout: that of the layers.

    Returns:
        The packed weights.
    """
    tables = LAYOUTS[layout].tables
    assert tables is not None, "a layout that rounds names one for head and embedding"
    kind: Any = LAYOUTS[tables].layer
    packed: dict[int, QuantisedLinear] = {}
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        weight = None if module is None else module.weight
        if weight is not None and weight.data_ptr() not in packed:
            packed[weight.data_ptr()] = kind.from_dense(weight.float(), None)
            weight.copy_(packed[weight.data_ptr()].dense_weight())
    return list(packed.values())
