"""The sparse24-int8 and sparse24-int4 layouts: the bytes against a loop, and what a table without zero cannot hold."""

import pytest
import torch

from gblm_compress.kernels.masks import PADDING
from gblm_compress.layouts import LAYOUTS
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models.packed_checkpoint import pack_

ODD = torch.arange(-15, 16, 2).char()  # 16 levels, none of them zero


def two_four(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randint(1, 8, (rows, columns), generator=generator).float()
    return weight * Pattern("2:4").mask(torch.rand(rows, columns, generator=generator), weight, 0.5)


@pytest.mark.parametrize("columns", [4, 60, 64, 100])
def test_values_lie_at_a_fixed_place(columns) -> None:
    """Two of every four columns, in order; int4 in one byte, the first in the low half."""
    weight = two_four(5, columns)
    weight[0, 0:4] = torch.tensor([0.0, 0.0, 3.0, 0.0])  # filled up at the first free place
    weight[1, 0:4] = 0.0
    grid = Grid(torch.ones(5, 1).half(), torch.arange(-8, 8).char(), None)
    bytes_, nibbles = [], []
    for row in weight.int().tolist():
        for first in range(0, columns, 4):
            stored = [at for at in range(first, first + 4) if row[at]]
            free = [at for at in range(first, first + 4) if not row[at]]
            one, two = sorted((stored + free)[:2])
            bytes_ += [row[one], row[two]]
            nibbles.append(row[one] + 8 | row[two] + 8 << 4)
    for layout, expected in (("sparse24-int8", bytes_), ("sparse24-int4", nibbles)):
        packed = LAYOUTS[layout].layer.from_dense(weight, None, grid=grid)
        assert packed.get_buffer("values").tolist() == expected + [0] * PADDING
        assert torch.equal(packed.dense_weight(), weight) and packed.error(weight) == 0.0


def test_a_table_without_zero_holds_full_groups_only() -> None:
    kind = LAYOUTS["sparse24-int4"].layer
    grid = Grid(torch.ones(8, 1).half(), ODD, None)
    weight = two_four(8, 64)
    weight = torch.where(weight == 0, 0.0, weight // 2 * 2 + 1)
    assert kind.from_dense(weight, None, grid=grid).error(weight) == 0.0
    weight[3, weight[3].nonzero()[0]] = 0.0
    assert kind.from_dense(weight, None, grid=grid).error(weight) == float("inf")
    grid.scales[3] = 0.0  # zero times any level
    weight[3] = 0.0
    assert kind.from_dense(weight, None, grid=grid).error(weight) == 0.0


def test_what_it_cannot_hold_is_packed_exactly() -> None:
    weight = two_four(8, 64)
    weight = torch.where(weight == 0, 0.0, weight // 2 * 2 + 1)
    weight[3, weight[3].nonzero()[0]] = 0.0
    model = torch.nn.Module()
    model.layer, model.config = torch.nn.Linear(64, 8, bias=False), type("Config", (), {})()
    model.layer.weight.data = weight
    grids = {"layer": Grid(torch.ones(8, 1).half(), ODD, None)}
    assert pack_(model, ["layer"], "sparse24-int4", grids=grids) == (["layer"], {})
    assert model.layer.LAYOUT == "bitmask" and torch.equal(model.layer.dense_weight(), weight)
