import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import ModelError
from gblm_compress.kernels.masks import PADDING, bits, row_counts, row_starts
from gblm_compress.layouts.bitmask import check, pack, unpack
from gblm_compress.layouts.packed import same_bits


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
    check(mask, values, weight.shape)
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


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12))
def test_bits_are_counted(words: list[int]) -> None:
    assert row_counts(torch.tensor([words])).tolist() == [sum((word & (2**64 - 1)).bit_count() for word in words)]


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 150), st.data())
@settings(max_examples=200, deadline=None)
def test_another_bit_or_length_or_shape_is_refused(seed: int, rows: int, columns: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask, values = pack(torch.randn(rows, columns, generator=generator).relu())
    word = data.draw(st.integers(0, mask.numel() - 1))
    flipped = mask.clone()
    flipped.view(-1)[word] ^= 1 << data.draw(st.integers(0, 62))
    other = torch.cat([values, values[-1:]]) if data.draw(st.booleans()) else values[:-1]
    for damaged, what in ((flipped, values), (mask, other), (mask, values[None]), (mask[:, :0], values)):
        with pytest.raises(ModelError, match="^(mask|values): "):
            check(damaged, what, (rows, columns))
    for shape in ((rows + 1, columns), (rows, columns + 64)):
        with pytest.raises(ModelError, match="^mask: "):
            check(mask, values, shape)


def test_bits_beyond_the_last_column_are_refused() -> None:
    """Their number is right, so that only their place tells; they would be written past the row."""
    mask, values = pack(torch.ones(3, 70))
    mask[1, 1] = 0b111111 << 6
    with pytest.raises(ModelError, match="mask: 1 rows have bits beyond the last of 70 columns"):
        check(mask, values, (3, 70))
    mask[1, 1] = 0b11111 | -(2**63)
    with pytest.raises(ModelError, match="mask: 1 rows have bits beyond"):
        check(mask, values, (3, 70))


def test_what_has_gaps_between_its_elements_is_refused() -> None:
    mask, values = pack(torch.ones(3, 200))
    with pytest.raises(ModelError, match="mask: int64 .*not contiguous"):
        check(mask.repeat_interleave(2, 1)[:, ::2], values, (3, 200))
    with pytest.raises(ModelError, match="values: .*not contiguous"):
        check(mask, values.repeat_interleave(2)[::2], (3, 200))
