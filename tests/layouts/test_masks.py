"""Kinds of masks: the bits against a loop, bit-exact round trips of values under them, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import ModelError
from gblm_compress.kernels.masks import PADDING
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import DTYPES, check_tensor, same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.patterns import Pattern
from tests.layouts.weights import EXACT, packed

BITMASK, SPARSE24 = (LAYOUTS[name].kind for name in EXACT)


@pytest.mark.parametrize("layout", EXACT)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40), st.sampled_from(DTYPES), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_round_trip_is_bit_exact(layout: str, seed: int, rows: int, groups: int, dtype, sparsity: float) -> None:
    """Ragged widths, full and empty rows, groups with 0, 1 and 2 nonzeros, all dtypes; with a bitmask -0.0 too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 4 * groups, generator=generator)
    if LAYOUTS[layout].pattern:
        weight *= Pattern("2:4").mask(weight.abs(), weight, 0.5)
    weight *= torch.rand(weight.shape, generator=generator) >= sparsity
    weight = weight.add(0.0).to(dtype)
    if layout == "bitmask":
        weight = weight[:, seed % 4 :]
        weight[0, 0] = -0.0
    layer = packed(layout, weight)
    layer.check()
    assert same_bits(layer.dense_weight(), weight.contiguous())


def test_the_bits_are_those_documented() -> None:
    weight = torch.zeros(2, 70)
    weight[0, 0], weight[0, 63], weight[0, 65], weight[1, 3] = 1.0, 2.0, 3.0, 4.0
    held = BITMASK.pack(weight)
    assert [[word & (2**64 - 1) for word in row] for row in held["mask"].tolist()] == [[1 | 1 << 63, 2], [8, 0]]
    assert held["values"].tolist() == [1.0, 2.0, 3.0, 4.0] + [0.0] * PADDING

    held = SPARSE24.pack(torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 5.0, 0.0]]))
    assert held["values"].tolist() == [[1.0, 2.0, 3.0, 4.0, 0.0, 5.0]]
    groups = [(1, 3), (0, 3), (0, 2)]  # the last has one nonzero; a zero at the lowest free position fills it up
    nibbles = [first | second << 2 for first, second in groups]
    assert held["positions"].tolist() == [[nibbles[0] | nibbles[1] << 4, nibbles[2]]]


@pytest.mark.parametrize("layout", EXACT)
def test_zeros_of_either_sign_may_be_stored(layout: str) -> None:
    """A cast to a narrower dtype makes some: they are weights like others."""
    layer = packed(layout, torch.tensor([[1e-9, -1e-9, 0.0, 0.0]])).half()
    layer.check()
    assert layer.values.flatten()[:2].tolist() == [0.0, 0.0] and not layer(torch.ones(1, 4).half()).any()


def test_same_bits_tells_minus_zero() -> None:
    assert same_bits(torch.tensor([0.0]), torch.tensor([0.0]))
    for other in (torch.tensor([-0.0]), torch.tensor([[0.0]]), torch.tensor([0], dtype=torch.int32)):
        assert not same_bits(torch.tensor([0.0]), other)


@pytest.mark.parametrize("groups", [3, 4])
def test_each_group_has_six_pairs_of_positions(groups: int) -> None:
    """Only bytes whose pairs increase, and whose unused half is zero, are accepted."""
    pairs = {first | second << 2 for second in range(4) for first in range(second)}
    accepted = pairs if groups == 3 else {low | high << 4 for low in pairs for high in pairs}
    for byte in range(256):
        held = {"positions": torch.tensor([[0x44, byte]]).byte(), "values": torch.ones(1, 2 * groups)}
        refused = pytest.raises(ModelError, match="positions: 1 bytes lack two increasing")
        with nullcontext() if byte in accepted else refused:
            SPARSE24.check(held, (1, 4 * groups), None)


def test_2_4_needs_groups_of_four() -> None:
    with pytest.raises(ModelError, match="6 columns are not a multiple of 4"):
        PackedLinear("sparse24", (8, 6), False, torch.float32)


def test_gaps_between_elements_are_refused() -> None:
    with pytest.raises(ModelError, match=r"x: int64 \[3, 2\], not contiguous; needs int64 \[3, 2\]"):
        check_tensor("x", torch.zeros(3, 4, dtype=torch.int64)[:, ::2], (torch.int64,), (3, 2))
