"""Quantised layouts: what lies where, what is restored, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import ModelError
from gblm_compress.kernels.masks import PADDING, words
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.masked import pack_places, unpack_places
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.quantised import group_of, groups_of
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid, make_grid

QUANTISED = pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.width])
GROUP = pytest.mark.parametrize("group", [None, 32, 64, 128])


def sparse_weight(layout: str, rows: int, columns: int) -> torch.Tensor:
    """2:4 where the layout needs it, with fewer nonzeros in some groups; an empty row."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    if pattern := LAYOUTS[layout].pattern:
        weight *= Pattern(pattern).mask(torch.rand(rows, columns, generator=generator), weight, 0.5)
        weight[:, ::9] = 0.0
    else:
        weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0.0
    weight[0] = 0.0
    return weight.add(0.0)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 200), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_places_lie_as_documented(seed: int, rows: int, columns: int, density: float) -> None:
    """Two to a byte, the first in the low half; each word of the mask begins with a byte."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    places = torch.randint(0, 16, (int(keep.sum()),), generator=generator, dtype=torch.uint8)
    mask = words(keep)
    values = pack_places(mask, places)
    expected, at = [], 0
    for row in keep.tolist():
        for first in range(0, columns, 64):
            count = sum(row[first : first + 64])
            word = [*places[at : at + count].tolist(), 0]
            expected += [word[i] | word[i + 1] << 4 for i in range(0, count, 2)]
            at += count
    assert values.tolist() == expected + [0] * PADDING
    assert torch.equal(unpack_places(mask, values), places)


@QUANTISED
@GROUP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_on_a_grid_are_restored_bit_for_bit(layout, group, dtype) -> None:
    """As a fit through the quantiser leaves them, rounded to the dtype of the checkpoint."""
    kind = LAYOUTS[layout].layer
    weight = sparse_weight(layout, 9, 200)
    grid = make_grid(weight, weight != 0, kind.KIND, group)
    scale = grid.scale_of(200)
    on_grid = torch.zeros_like(weight)
    for row, column in (weight != 0).nonzero().tolist():
        values = grid.levels.float() * float(scale[row, column if group else 0])
        on_grid[row, column] = values[(values - weight[row, column]).abs().argmin()]
    on_grid = on_grid.to(dtype)
    packed = kind.from_dense(on_grid, None, grid=grid)
    assert packed.group == group
    assert same_bits(packed.dense_weight(), on_grid) and packed.restores(on_grid)


@QUANTISED
@GROUP
def test_what_is_not_the_nearest_point_is_no_restoration(layout, group) -> None:
    weight = sparse_weight(layout, 9, 200)
    packed = LAYOUTS[layout].layer.from_dense(weight, None, group=group)
    assert packed.restores(weight) and packed.error(weight) < packed.LARGEST_ERROR
    assert float(packed.dense_weight()[weight == 0].abs().sum()) == 0.0
    for other in (weight * 1.1, torch.where(weight == 0, 1.0, weight), weight.half(), weight[1:]):
        assert not packed.restores(other)


@QUANTISED
def test_the_error_is_the_share_that_rounding_moved(layout) -> None:
    """It grows where few weights decide the scale of many."""
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 1::4] = weight[:, 2::4] = 0.0
    kind = LAYOUTS[layout].layer
    packed = kind.from_dense(weight, None)
    pairs = zip(packed.dense_weight().flatten().tolist(), weight.flatten().tolist(), strict=True)
    moved = sum(abs(held - given) for held, given in pairs)
    assert packed.error(weight) == pytest.approx(moved / float(weight.abs().sum()), rel=1e-4)
    assert packed.error(weight) < kind.LARGEST_ERROR
    weight[:, ::52] = 10.0 + 2 * torch.arange(20).reshape(4, 5)
    assert kind.from_dense(weight, None).error(weight) > kind.LARGEST_ERROR


@pytest.mark.parametrize(
    ("layout", "bits_a_weight"),
    [("bitmask-int8", 5.25), ("bitmask-int4", 3.25), ("sparse24-int8", 5.0), ("sparse24-int4", 3.0), ("int8", 8.25)],
)
def test_size_at_half_density_in_groups_of_64(layout, bits_a_weight) -> None:
    weight = torch.ones(64, 1024)
    weight[:, ::2] = 0.0
    packed = LAYOUTS[layout].layer.from_dense(weight, None, group=64)
    more = (0 if layout == "int8" else PADDING) + (16 if layout.endswith("-int4") else 0)
    assert 8 * (packed.packed_bytes - more) == bits_a_weight * weight.numel()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 65, 127, 129, 4096])
def test_the_number_of_groups_tells_their_size(columns) -> None:
    for group in (None, 32, 64, 128):
        found = group_of(columns, groups_of(columns, group))
        assert groups_of(columns, found) == groups_of(columns, group)
        assert found == group or groups_of(columns, group) == 1
    with pytest.raises(ModelError, match="scales: 999 for each row"):
        group_of(columns, 999)


@QUANTISED
def test_other_bits_are_refused(layout) -> None:
    packed = LAYOUTS[layout].layer.from_dense(sparse_weight(layout, 4, 100), None, group=64)
    damages = {
        "scales": [lambda t: t - 0x7FFF, lambda t: t * 0 + 0x7C00, lambda t: t[:, :1].repeat(1, 7), lambda t: t.half()],
        "mask": [lambda t: t * 0, lambda t: t[1:], lambda t: t | (1 << 40), lambda t: t.int()],
        "patterns": [lambda t: t * 0, lambda t: t[1:], lambda t: t | 7, lambda t: t.int(), lambda t: t | 128],
        "levels": [lambda t: t.flip(1), lambda t: t * 0, lambda t: t[:, :8], lambda t: t.int(), lambda t: t[0]],
        "values": [lambda t: t[:-1], lambda t: t.half(), lambda t: t[None], lambda t: (t * 0 - 64) * 2],
    }
    for name in packed.PACKED:
        sound = packed.get_buffer(name)
        for damage in damages[name]:
            if name == "values" and layout.endswith("-int4") and len(damage(sound)) == len(sound):
                continue  # any place is one
            setattr(packed, name, damage(sound).contiguous())
            with pytest.raises(ModelError, match="^(mask|patterns|values|scales|levels): "):
                packed.check()
        setattr(packed, name, sound)
    packed.check()


@QUANTISED
@pytest.mark.parametrize("group", [0, 16, 65, True, 64.0, "64"], ids=repr)
def test_groups_that_there_are_not(layout, group) -> None:
    sizes = {"stored": 0} if layout.startswith("bitmask") else {}
    with pytest.raises(ModelError, match="is none of 32, 64, 128"):
        LAYOUTS[layout].layer((4, 100), False, torch.float32, group=group, **sizes)


def test_an_empty_matrix() -> None:
    grid = Grid(torch.zeros(3, 1).half(), torch.arange(-8, 8).char(), None)
    for layout in ("bitmask-int4", "sparse24-int4"):
        packed = LAYOUTS[layout].layer.from_dense(torch.zeros(3, 72), None, grid=grid)
        assert not packed(torch.randn(2, 72)).any()
