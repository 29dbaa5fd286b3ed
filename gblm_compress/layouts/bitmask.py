"""The `bitmask` layout: one bit for each weight, and the nonzeros packed in order. Any pattern.

Rows of the mask are whole 64-bit words: bit b of word w is column 64·w + b. The values are followed by
`PADDING` zeros, so that kernels may load whole vectors past the end. At 50 % the layout takes 17/32 of dense in
32 bit and 9/16 in 16 bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels.masks import PADDING, WORD, bits, row_counts
from gblm_compress.layouts.packed import DTYPES, check_tensor

_INTEGER_OF = {4: torch.int32, 2: torch.int16}


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a matrix.

    Args:
        weight: [rows, columns] in float32, float16 or bfloat16.

    Returns:
        mask [rows, ceil(columns / 64)] in int64, and values [nonzeros + PADDING] in the dtype of `weight`. What has a
        bit is everything but +0.0, so that the round trip is exact even for -0.0.
    """
    rows, columns = weight.shape
    alive = weight.contiguous().view(_INTEGER_OF[weight.element_size()]) != 0
    padded = torch.nn.functional.pad(alive, (0, -columns % WORD))
    bytes_of_8 = padded.reshape(rows, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=weight.device)
    mask = bytes_of_8.sum(-1, dtype=torch.uint8).view(torch.int64)
    values = torch.cat([weight[alive], weight.new_zeros(PADDING)])
    return mask, values


def unpack(mask: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense matrix [rows, columns] of `pack`, bit for bit."""
    alive = bits(mask, columns)
    dense = values.new_zeros(alive.shape)
    dense[alive] = values[: values.numel() - PADDING]
    return dense


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (so that -0.0 differs from +0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(mask: Tensor, values: Tensor, shape: Sequence[int]) -> None:
    """Hold two tensors against the layout of a matrix of that shape; what passes, kernels may read.

    A stored value may be zero, of either sign: weights become zero when they are cast to a narrower dtype.

    Raises:
        ModelError: they are no such matrix; the message begins with the tensor's name.
    """
    rows, columns = shape
    check_tensor("mask", mask, (torch.int64,), (rows, -(-columns // WORD)))
    in_last = columns % WORD
    if in_last and (outside := int((mask[:, -1] & (-1 << in_last)).count_nonzero())):
        raise ModelError(f"mask: {outside} rows have bits beyond the last of {columns} columns; the file is damaged")
    nonzeros = int(row_counts(mask).sum())
    if values.dim() != 1 or len(values) != nonzeros + PADDING:
        raise ModelError(
            f"values: shape {list(values.shape)}; the mask has {nonzeros} bits, which takes [{nonzeros + PADDING}]: "
            f"one for each, and {PADDING} zeros of padding"
        )
    check_tensor("values", values, DTYPES, values.shape)
    if values[nonzeros:].count_nonzero():
        raise ModelError(f"values: the last {PADDING} must be zeros of padding; the file is damaged")
