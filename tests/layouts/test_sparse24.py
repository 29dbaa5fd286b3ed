"""The sparse24 layout: bit-exact round trips, and the bits themselves against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.layouts.sparse24 import check, pack, unpack
from gblm_compress.methods.patterns import Pattern


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_round_trip_is_bit_exact(seed: int, rows: int, groups: int, dtype: torch.dtype, extra: float) -> None:
    """Rows of odd group counts, groups with 0, 1 and 2 nonzeros, all dtypes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 4 * groups, generator=generator)
    weight = weight * Pattern("2:4").mask(weight.abs(), weight, 0.5)
    weight = (weight * (torch.rand(weight.shape, generator=generator) >= extra)).add(0.0).to(dtype)
    values, positions = pack(weight)
    assert values.shape == (rows, 2 * groups) and positions.shape == (rows, (groups + 1) // 2)
    check(values, positions, weight.shape)
    restored = unpack(values, positions)
    assert restored.dtype == dtype
    assert torch.equal(restored.view(torch.uint8), weight.contiguous().view(torch.uint8))


def test_the_bits_are_those_documented() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 5.0, 0.0]])
    values, positions = pack(weight)
    assert values.tolist() == [[1.0, 2.0, 3.0, 4.0, 0.0, 5.0]]
    groups = [
        (1, 3),
        (0, 3),
        (0, 2),
    ]  # the last has one nonzero; a zero at the lowest free position fills it up
    nibbles = [first | second << 2 for first, second in groups]
    assert positions.tolist() == [[nibbles[0] | nibbles[1] << 4, nibbles[2]]]


def test_size_is_nine_sixteenths_in_16_bit() -> None:
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    values, positions = pack(weight)
    assert (values.nbytes + positions.nbytes) / weight.nbytes == 9 / 16


def test_what_is_not_2_4_is_refused() -> None:
    with pytest.raises(UsageError, match="row 0, columns 4 to 7: 3 nonzeros"):
        pack(torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]]))
    with pytest.raises(UsageError, match="not a multiple of 4"):
        pack(torch.zeros(2, 6))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_each_group_has_six_pairs_of_positions(groups: int) -> None:
    """Only bytes whose pairs increase, and whose unused half is zero, are accepted."""
    values = torch.ones(1, 2 * groups)
    taken = 0
    for byte in range(256):
        positions = torch.tensor([[0x44] * (groups // 2) + [byte] * (groups % 2) if groups % 2 else [byte]])
        pairs = [(byte & 3, byte >> 2 & 3), (byte >> 4 & 3, byte >> 6)][: 2 - groups % 2]
        if all(low < high for low, high in pairs) and (groups % 2 == 0 or byte < 16):
            check(values, positions.to(torch.uint8), (1, 4 * groups))
            taken += 1
        else:
            with pytest.raises(ModelError, match="positions: 1 bytes hold no two increasing"):
                check(values, positions.to(torch.uint8), (1, 4 * groups))
    assert taken == (6 if groups % 2 else 36)


def test_tensors_of_another_form_are_refused() -> None:
    values, positions = pack(torch.zeros(2, 16))
    for stored, places, name in (
        (values.double(), positions, "values: float64"),
        (values[:, :-1], positions, "values: float32"),
        (values * float("nan"), positions, "values: holds NaN"),
        (values, positions.int(), "positions: int32"),
        (values, positions[:1], "positions: uint8"),
        (values, positions.T.contiguous().T, "positions: .*not contiguous"),
    ):
        with pytest.raises(ModelError, match=name):
            check(stored, places, (2, 16))
    with pytest.raises(ModelError, match="6 columns are not a multiple of 4"):
        check(values, positions, (2, 6))
