"""Kinds of values: what lies where, what is restored and refused, and layers that are stacked and cut."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels.masks import PADDING, words
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import DTYPES, same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.layouts.values import group_of, groups_of, pack_places, unpack_places
from gblm_compress.methods.quantisation import make_grid
from gblm_compress.models.packed_checkpoint import pack_
from tests.layouts.weights import ROUNDING, packed, sparse

LAYOUT_NAMES = pytest.mark.parametrize("layout", LAYOUTS)
QUANTISED = pytest.mark.parametrize("layout", ROUNDING)


@pytest.fixture(autouse=True)
def two_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("packed", "values"):
        monkeypatch.setattr(f"gblm_compress.layouts.{module}.AT_ONCE", 400)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 200), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_places_lie_as_documented(seed: int, rows: int, columns: int, density: float) -> None:
    """Two to a byte, the first in the low half; each word of the mask begins with a byte."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    places = torch.randint(0, 16, (int(keep.sum()),), generator=generator, dtype=torch.uint8)
    values = pack_places(words(keep), places)
    expected, at = [], 0
    for row in keep.tolist():
        for first in range(0, columns, 64):
            count = sum(row[first : first + 64])
            word = [*places[at : at + count].tolist(), 0]
            expected += [word[i] | word[i + 1] << 4 for i in range(0, count, 2)]
            at += count
    assert values.tolist() == expected
    assert torch.equal(unpack_places(words(keep), values), places)


@QUANTISED
@pytest.mark.parametrize("factor", [1e-8, 1e-36, 1e30])
def test_weights_whose_scales_float16_does_not_hold(layout: str, factor: float) -> None:
    """Too small ones are packed exactly, and too large ones are an error of the layer."""
    weight, model = sparse(layout, 8, 64) * factor, torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    model[0].weight.data, model.config = weight, SimpleNamespace()
    if factor > 1:
        with pytest.raises(ModelError, match=r"^0\.scales: some are negative or .* the weights are too large"):
            pack_(model, ["0"], layout)
    else:
        assert pack_(model, ["0"], layout) == (["0"], {})
        assert model[0].layout == "bitmask" and torch.equal(model[0].dense_weight(), weight)


@QUANTISED
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_on_a_grid_are_restored_bit_for_bit(layout: str, group: int | None, dtype: torch.dtype) -> None:
    """As a fit through the quantiser leaves them, rounded to the dtype of the checkpoint."""
    weight = sparse(layout, 9, 200)
    grid = make_grid(weight, weight != 0, LAYOUTS[layout].kind.kind, group)
    scale = grid.scale_of(200)
    on_grid = torch.zeros_like(weight)
    for row, column in (weight != 0).nonzero().tolist():
        values = grid.levels.float() * float(scale[row, column if group else 0])
        on_grid[row, column] = values[(values - weight[row, column]).abs().argmin()]
    on_grid = on_grid.to(dtype)
    layer = packed(layout, on_grid, grid=grid)
    assert layer.group == group
    assert same_bits(layer.dense_weight(), on_grid) and layer.restores(on_grid)


@QUANTISED
def test_other_weights_than_the_nearest_points_are_no_restoration(layout: str) -> None:
    weight = sparse(layout, 9, 200)
    layer = packed(layout, weight, group=64)
    assert layer.restores(weight) and not layer.dense_weight()[weight == 0].any()
    for other in (weight * 1.1, torch.where(weight == 0, 1.0, weight), weight.half(), weight[1:]):
        assert not layer.restores(other)


@QUANTISED
def test_the_error_is_the_share_that_rounding_moved(layout: str) -> None:
    """It grows where few weights decide the scale of many."""
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 1::4] = weight[:, 2::4] = 0.0
    layer = packed(layout, weight)
    pairs = zip(layer.dense_weight().flatten().tolist(), weight.flatten().tolist(), strict=True)
    moved = sum(abs(held - given) for held, given in pairs)
    assert layer.error(weight) == pytest.approx(moved / float(weight.abs().sum()), rel=1e-4)
    assert layer.error(weight) < layer.largest_error
    weight[:, ::52] = 10.0 + 2 * torch.arange(20).reshape(4, 5)
    assert packed(layout, weight).error(weight) > layer.largest_error


HALF_DENSE = {"bitmask": 9, "sparse24": 9, "bitmask-int8": 5.25, "bitmask-int4": 3.25, "int8": 8.25}


@LAYOUT_NAMES
def test_bits_of_a_weight_at_half_density_in_groups_of_64(layout: str) -> None:
    kind, weight = LAYOUTS[layout].kind, torch.ones(64, 1024)
    weight[:, ::2] = 0.0
    layer = packed(layout, weight if kind.width else weight.bfloat16(), **({"group": 64} if kind.width else {}))
    more = (0 if layout in ("int8", "sparse24") else PADDING) + (16 if layout.endswith("-int4") else 0)
    assert 8 * (layer.packed_bytes - more * layer.values.itemsize) == HALF_DENSE[layout] * weight.numel()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 65, 127, 129, 4096])
def test_the_number_of_groups_tells_their_size(columns: int) -> None:
    for group in (None, 32, 64, 128):
        found = group_of(columns, groups_of(columns, group))
        assert groups_of(columns, found) == groups_of(columns, group)
        assert found == group or groups_of(columns, group) == 1
    with pytest.raises(ModelError, match="scales: 999 for each row"):
        group_of(columns, 999)


HALF_INFINITE, HALF_NAN = 0x7C00, 0x7E00
# {buffer: {message: damages}}
DAMAGES: dict[str, dict[str, list[Any]]] = {
    "scales": {
        "negative or not finite": [lambda t: t - 0x7FFF, lambda t: t * 0 + HALF_INFINITE, lambda t: t * 0 + HALF_NAN],
        "needs int16": [lambda t: t[:, :1].repeat(1, 7), lambda t: t[1:], lambda t: t.half()],
        "all are zero": [lambda t: t * 0],
    },
    "mask": {
        r"needs .* \[64\]": [lambda t: t * 0],  # values: padding alone
        "needs int64": [lambda t: t[1:], lambda t: t.int()],
        "4 rows have bits beyond the last of 100 columns": [lambda t: t | (1 << 40), lambda t: t | -(2**63)],
    },
    "positions": {"lack two increasing": [lambda t: t * 0], "needs uint8": [lambda t: t[1:], lambda t: t.int()]},
    "levels": {
        "they do not increase": [lambda t: t.flip(1), lambda t: t * 0],
        "needs int8": [lambda t: t[:, :8], lambda t: t.int(), lambda t: t[0]],
    },
    "values": {"needs": [lambda t: t[:-1], lambda t: t[None], lambda t: t.double()]},
}
VALUES: dict[int | None, dict[str, list[Any]]] = {
    None: {"holds NaN or infinite": [lambda t: t * float("nan")]},
    8: {"a level is below -127": [lambda t: t.index_fill(0, torch.tensor([0]), -128)]},
    4: {},  # any place is one
}
PADDED = {"the last 64 must be zeros": [lambda t: t.index_fill(0, torch.tensor([len(t) - 1]), 1)]}


@LAYOUT_NAMES
def test_damaged_tensors_are_refused(layout: str) -> None:
    width = LAYOUTS[layout].width
    layer = packed(layout, sparse(layout, 4, 100), **({"group": 64} if width else {}))
    damages = {**DAMAGES, "values": DAMAGES["values"] | VALUES[width] | (PADDED if layer.values.dim() == 1 else {})}
    for name in layer.kind.names:
        sound = layer.get_buffer(name)
        for message, damage in ((message, each) for message, found in damages[name].items() for each in found):
            setattr(layer, name, damage(sound).contiguous())
            with pytest.raises(ModelError, match=f"^(values|{name}): .*({message})"):
                layer.check()
        setattr(layer, name, sound)
    layer.check()


@pytest.mark.parametrize("group", [0, 16, 65, True, 64.0, "64"], ids=repr)
def test_groups_that_there_are_not(group: Any) -> None:
    with pytest.raises(ModelError, match="is not one of 32, 64, 128"):
        PackedLinear("int8", (4, 100), False, torch.float32, group=group)


def same(layer: PackedLinear, weight: Tensor) -> bool:
    """Whether a layer is sound and has that weight, in the bytes that packing gives where nothing is rounded."""
    layer.check()
    assert layer.shape == tuple(weight.shape)
    expected = {} if LAYOUTS[layer.layout].width else packed(layer.layout, weight.contiguous()).held
    return same_bits(layer.dense_weight(), weight.contiguous()) and all(
        same_bits(layer.held[name], tensor) for name, tensor in expected.items()
    )


@LAYOUT_NAMES
@given(st.data(), st.sampled_from(DTYPES), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_stacked(layout: str, data: Any, dtype: torch.dtype, seed: int) -> None:
    columns = 4 * data.draw(st.integers(1, 40))
    heights = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    layers = [packed(layout, sparse(layout, rows, columns, seed + i, dtype)) for i, rows in enumerate(heights)]
    assert same(PackedLinear.stack(layers), torch.cat([layer.dense_weight() for layer in layers]))


@LAYOUT_NAMES
@given(st.data(), st.sampled_from(DTYPES), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_cut(layout: str, data: Any, dtype: torch.dtype, seed: int) -> None:
    """Where words of the mask, bytes of positions and rows begin and end anywhere."""
    step = 64 if layout.endswith("-int4") else 4 if LAYOUTS[layout].pattern else 1
    rows, columns = data.draw(st.integers(1, 6)), 4 * data.draw(st.integers(1, 40))
    first, last = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    edges = st.sampled_from([*range(0, columns, step), columns])
    left, right = sorted(data.draw(st.lists(edges, min_size=2, max_size=2, unique=True)))
    whole = packed(layout, sparse(layout, rows, columns, seed, dtype))
    part = whole.cut(range(first, last), range(left, right))
    assert same(part, whole.dense_weight()[first:last, left:right])
    all_of_it = whole.cut(range(rows), range(columns)).held  # as of a file, of which nothing is kept
    assert all(all_of_it[name].data_ptr() != tensor.data_ptr() for name, tensor in whole.held.items())


def test_groups_of_2_4_are_not_cut_in_two() -> None:
    with pytest.raises(UsageError, match="not 2:4: in_features=6 is not a multiple of 4"):
        packed("sparse24", sparse("sparse24", 2, 16)).cut(range(2), range(6, 12))


@QUANTISED
def test_columns_that_share_a_scale_are_not_cut_apart(layout: str) -> None:
    whole = packed(layout, sparse(layout, 4, 200), group=64)
    with pytest.raises(UsageError, match="columns 8 to 127: 64 columns share a scale, so the layout can be"):
        whole.cut(range(4), range(8, 128))
    for columns in (range(64, 128), range(128, 200), range(200)):
        part = whole.cut(range(1, 3), columns)
        assert same(part, whole.dense_weight()[1:3, columns.start : columns.stop])


def test_int4_layers_with_other_levels_are_stacked() -> None:
    weights = [sparse("bitmask-int4", 5, 100, seed) for seed in range(3)]
    grids = [make_grid(weight, weight != 0, "int4", 64, torch.ones(100)) for weight in weights]
    layers = [packed("bitmask-int4", weight, grid=grid) for weight, grid in zip(weights, grids, strict=True)]
    whole = PackedLinear.stack(layers)
    assert whole.held["levels"].shape == (15, 16)
    expected = torch.cat([layer.dense_weight() for layer in layers])
    assert torch.equal(whole.dense_weight(), expected)
    with pytest.raises(UsageError, match="have scales for different numbers of columns"):
        PackedLinear.stack([layers[0], packed("bitmask-int4", weights[1], group=32)])
