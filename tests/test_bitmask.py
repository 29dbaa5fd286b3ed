import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.bitmask import PADDING, bits, pack, row_starts, same_bits, unpack


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 0.5, 0.97, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_is_bit_exact(seed: int, rows: int, columns: int, dtype: torch.dtype, sparsity: float) -> None:
    """Odd widths, full and empty rows, all dtypes, and -0.0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0.0
    weight[0, 0] = -0.0
    weight = weight.to(dtype)
    mask, values = pack(weight)
    assert mask.shape == (rows, -(-columns // 64)) and values.dtype == dtype
    assert same_bits(unpack(mask, values, columns), weight)
    starts = row_starts(mask).tolist()
    for row, start in enumerate(starts):
        alive = weight[row][bits(mask, columns)[row]]
        assert torch.equal(values[start : start + len(alive)], alive)


def test_the_bits_are_those_documented() -> None:
    weight = torch.zeros(2, 70)
    weight[0, 0], weight[0, 63], weight[0, 65], weight[1, 3] = 1.0, 2.0, 3.0, 4.0
    mask, values = pack(weight)
    assert [[word & (2**64 - 1) for word in row] for row in mask.tolist()] == [[1 | 1 << 63, 2], [8, 0]]
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0] + [0.0] * PADDING


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 17 / 32), (torch.bfloat16, 9 / 16)])
def test_size_at_half_density(dtype: torch.dtype, share: float) -> None:
    weight = torch.ones(64, 1024, dtype=dtype)
    weight[:, ::2] = 0
    mask, values = pack(weight)
    assert (mask.nbytes + values[:-PADDING].nbytes) / weight.nbytes == share


def test_same_bits_tells_minus_zero() -> None:
    assert same_bits(torch.tensor([0.0]), torch.tensor([0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([[0.0]]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([0], dtype=torch.int32))
