"""The fast forms against the plain ones."""

import pytest
import torch

from gblm_compress.methods.zeros import count_nonzeros, has_negative_zeros, is_finite, keep_only, positive_zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(dtype: torch.dtype) -> torch.Tensor:
    """With both zeros, subnormals and the largest of the dtype; [rows, columns], not contiguous."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 4, info.max, info.min]
    values = torch.cat([torch.tensor(special, dtype=dtype), torch.linspace(-1, 1, 30).to(dtype)])
    return values.reshape(9, 4).T


@pytest.mark.parametrize("dtype", DTYPES)
def test_survivors_keep_their_bits_and_zeros_are_positive(dtype: torch.dtype) -> None:
    before = weight(dtype)
    keep = torch.rand(before.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for got, expected in ((keep_only(before, keep), before.masked_fill(~keep, 0.0)), (positive_zeros(before), before)):
        expected = torch.where(expected == 0, torch.zeros((), dtype=dtype), expected)
        assert torch.equal(got, expected) and torch.equal(got.signbit(), expected.signbit())
        assert got.dtype == dtype and not has_negative_zeros(got)
    assert has_negative_zeros(before)
    assert count_nonzeros(before) == torch.count_nonzero(before) == 34


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    assert is_finite(weight(dtype))
    for position in range(36):
        values = weight(dtype).contiguous()
        values.view(-1)[position] = value
        assert not is_finite(values)
