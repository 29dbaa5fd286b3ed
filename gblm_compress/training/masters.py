"""What a fit moves and what the network sees of it: weights of layers, and the scales of those that lie on grids."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gblm_compress.methods.quantisation import Grid, rounded, straight_through
from gblm_compress.methods.zeros import positive_zeros
from gblm_compress.models.architecture import as_matrix, weight_matrix

SCALE_RATE = 0.1
"""Steps of a scale beside those of a weight, both relative to their sizes: a scale moves a whole group."""


@dataclass(frozen=True)
class Masters:
    """The pruned layers of a network.

    Beside its weight, a layer on a grid has numbers [rows, groups] to be moved, which stretch its scales. The network
    sees its survivors rounded; gradients pass through (`straight_through`).

    Attributes:
        layers: {name of the weight in the network: layer}.
        grids: {name of the weight: grid}, of the layers that lie on one.
    """

    layers: Mapping[str, nn.Module]
    grids: Mapping[str, Grid] = field(default_factory=dict)

    @property
    def start(self) -> dict[str, Tensor]:
        """What `fit` moves, as it is now; weights are not rounded."""
        weights = {name: layer.get_parameter("weight").detach() for name, layer in self.layers.items()}
        return weights | {_scales(name): torch.ones_like(grid.scales.float()) for name, grid in self.grids.items()}

    def for_products(self, seen: dict[str, Tensor], compute: str) -> dict[str, Tensor]:
        """The weights with which the network computes: as it stores them, but in float32 where that is float16 and
        products round them to bfloat16, since float16 would lose their gradients."""
        dtypes = {name: layer.get_parameter("weight").dtype for name, layer in self.layers.items()}
        wide = {name for name, dtype in dtypes.items() if dtype is torch.float16 and compute == "bfloat16"}
        return {name: weight if name in wide else weight.to(dtypes[name]) for name, weight in seen.items()}

    def seen(self, moved: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as the network is to see them, {name: in float32, as the layer stores it}."""
        return {
            name: as_matrix(layer, straight_through(as_matrix(layer, moved[name]), _stretch(moved, name), grid))
            if (grid := self.grids.get(name))
            else moved[name]
            for name, layer in self.layers.items()
        }

    def stretched(self, moved: dict[str, Tensor]) -> dict[str, Grid]:
        """{name of the weight: its grid}, with the scales that were moved."""
        return {name: grid.stretched(_stretch(moved, name)) for name, grid in self.grids.items()}

    @torch.no_grad()
    def write_(self, moved: dict[str, Tensor]) -> dict[str, Grid]:
        """Write what was moved into the layers, on their grids and in their dtype; zeros are +0.0.

        Returns:
            {name of the weight: its grid as it is now}.
        """
        grids = self.stretched(moved)
        for name, layer in self.layers.items():
            write_(layer, as_matrix(layer, moved[name]), grids.get(name))
        return grids


@torch.no_grad()
def write_(layer: nn.Module, values: Tensor, grid: Grid | None) -> None:
    """Copy values [out_features, in_features] into a layer, the survivors on their nearest points of a grid if it has
    one, in the layer's dtype; zeros are +0.0.
    """
    if grid is not None:
        values = rounded(values, values != 0, grid)
    weight = weight_matrix(layer)
    weight.copy_(positive_zeros(values.to(weight.dtype)))  # only now: a small weight may have become -0.0


def _scales(name: str) -> str:
    return f"{name}, scales"


def _stretch(moved: dict[str, Tensor], name: str) -> Tensor:
    """The factors of a layer's scales: 1 at the start."""
    return 1 + SCALE_RATE * (moved[_scales(name)] - 1)
