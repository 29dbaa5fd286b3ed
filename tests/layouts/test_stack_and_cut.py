"""Packed layers stacked and cut: bit for bit what packing the dense matrix, stacked or cut, gives.

Where packing rounds, the weights stay those of the layers that were stacked or cut.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm_compress.errors import UsageError
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import make_grid

LAYOUT_NAMES = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def matrix(layout: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """2:4 at least, with full and empty rows where the layout takes any pattern."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if LAYOUTS[layout].pattern:
        weight = weight * Pattern("2:4").mask(weight.abs(), weight, 0.5)
    else:
        weight = weight * (torch.rand(rows, columns, generator=generator) < torch.rand(rows, 1, generator=generator))
        weight[-1] = 0.0
    return weight.add(0.0).to(dtype)


def packed(layout: str, weight: Tensor) -> tuple[Tensor, ...]:
    return tensors(LAYOUTS[layout].layer.from_dense(weight, None))


def tensors(layer: PackedLinear) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name) for name in layer.PACKED)


def holding(layout: str, weight: Tensor) -> PackedLinear:
    return LAYOUTS[layout].layer.holding(weight.shape, *packed(layout, weight))


def same(layer: PackedLinear, weight: Tensor, layout: str) -> bool:
    layer.check()
    if LAYOUTS[layout].width:
        return same_bits(layer.dense_weight(), weight.contiguous())
    expected = packed(layout, weight)
    return (layer.out_features, layer.in_features) == tuple(weight.shape) and all(
        map(same_bits, tensors(layer), expected)
    )


@LAYOUT_NAMES
@given(st.data(), DTYPES, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_stacked(layout: str, data: Any, dtype: torch.dtype, seed: int) -> None:
    columns = 4 * data.draw(st.integers(1, 40))
    heights = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    weights = [matrix(layout, rows, columns, dtype, seed + i) for i, rows in enumerate(heights)]
    layers = [holding(layout, weight) for weight in weights]
    assert same(LAYOUTS[layout].layer.stack(layers), torch.cat([layer.dense_weight() for layer in layers]), layout)


@LAYOUT_NAMES
@given(st.data(), DTYPES, st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_cut(layout: str, data: Any, dtype: torch.dtype, seed: int) -> None:
    """Where words of the mask, bytes of positions and rows begin and end anywhere."""
    step = 64 if layout.endswith("-int4") else 4 if LAYOUTS[layout].pattern else 1
    weight = matrix(layout, data.draw(st.integers(1, 6)), 4 * data.draw(st.integers(1, 40)), dtype, seed)
    rows, columns = weight.shape
    first, last = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    edges = st.sampled_from([*range(0, columns, step), columns])
    left, right = sorted(data.draw(st.lists(edges, min_size=2, max_size=2, unique=True)))
    whole = holding(layout, weight)
    part = whole.cut(range(first, last), range(left, right))
    assert same(part, whole.dense_weight()[first:last, left:right], layout)


@LAYOUT_NAMES
def test_what_is_cut_out_of_a_file_keeps_none_of_it(layout: str) -> None:
    whole = holding(layout, matrix(layout, 8, 128, torch.float32, 0))
    part = whole.cut(range(8), range(128))
    assert all(cut.data_ptr() != of.data_ptr() for cut, of in zip(tensors(part), tensors(whole), strict=True))


@LAYOUT_NAMES
def test_halves_stacked_again_multiply_like_the_whole(layout: str) -> None:
    weight = matrix(layout, 64, 256, torch.float32, 0)
    whole = LAYOUTS[layout].layer.from_dense(weight, None)
    halves = [whole.cut(range(first, first + 32), range(256)) for first in (0, 32)]
    again = LAYOUTS[layout].layer.stack(halves)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), whole(x))
    bias = torch.arange(64.0)
    torch.testing.assert_close(again.product(x, bias), whole(x) + bias)


def test_stored_zeros_stay_stored() -> None:
    """What became zero in a narrower dtype still has its bit."""
    weight = torch.tensor([[1.0, 1e-9, 0.0, 2.0], [0.0, 1e-9, 3.0, 0.0]])
    layer = holding("bitmask", weight)
    layer.values = layer.values.half().float()
    part = layer.cut(range(1, 2), range(1, 3))
    part.check()
    assert part.values[:2].tolist() == [0.0, 3.0]


@pytest.mark.parametrize("layout", ["sparse24", "sparse24-int8"])
def test_groups_of_2_4_are_not_cut_in_two(layout: str) -> None:
    with pytest.raises(UsageError, match=f"columns 6 to 11: the {layout} layout can be cut at multiples of 4 only"):
        holding(layout, matrix(layout, 2, 16, torch.float32, 0)).cut(range(2), range(6, 12))


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.width])
def test_columns_that_share_a_scale_are_not_cut_apart(layout: str) -> None:
    whole = LAYOUTS[layout].layer.from_dense(matrix(layout, 4, 200, torch.float32, 0), None, group=64)
    with pytest.raises(UsageError, match=f"columns 8 to 127: scales are shared by 64 columns, and the {layout} layout"):
        whole.cut(range(4), range(8, 128))
    for columns in (range(64, 128), range(128, 200), range(200)):
        part = whole.cut(range(1, 3), columns)
        part.check()
        assert same_bits(part.dense_weight(), whole.dense_weight()[1:3, columns.start : columns.stop].contiguous())


@pytest.mark.parametrize("layout", ["bitmask-int4", "sparse24-int4"])
def test_int4_layers_with_other_levels_are_stacked(layout: str) -> None:
    kind = LAYOUTS[layout].layer
    weights = [matrix(layout, 5, 100, torch.float32, seed) for seed in range(3)]
    grids = [make_grid(weight, weight != 0, "int4", 64, torch.ones(100)) for weight in weights]
    layers = [kind.from_dense(weight, None, grid=grid) for weight, grid in zip(weights, grids, strict=True)]
    whole = kind.stack(layers)
    assert whole.get_buffer("levels").shape == (15, 16)
    expected = torch.cat([layer.dense_weight() for layer in layers])
    assert torch.equal(whole.dense_weight(), expected)
    part = whole.cut(range(4, 11), range(100))
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part(x), x @ expected[4:11].T, rtol=1e-3, atol=1e-3)


def test_a_layout_that_says_nothing_of_it_is_neither_stacked_nor_cut(monkeypatch) -> None:
    kind = LAYOUTS["bitmask"].layer
    layer = holding("bitmask", torch.ones(2, 4))
    for name in ("stack", "cut"):
        monkeypatch.delattr(kind, name)
    with pytest.raises(UsageError, match="the bitmask layout cannot be stacked"):
        kind.stack([layer])
    with pytest.raises(UsageError, match="the bitmask layout cannot be cut"):
        layer.cut(range(1), range(4))
