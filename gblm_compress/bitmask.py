"""The `bitmask` layout: one bit for each weight, and the nonzeros packed in order. Any pattern.

Rows of the mask are whole 64-bit words: bit b of word w is column 64·w + b. The values are followed by
`PADDING` zeros, so that kernels may load whole vectors past the end. At 50 % the layout takes 17/32 of dense in
32 bit and 9/16 in 16 bit.
"""

import torch
from torch import Tensor

WORD = 64
PADDING = 64
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
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def bits(mask: Tensor, columns: int) -> Tensor:
    """The mask as booleans [rows, columns]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    spread = (mask.view(torch.uint8).unsqueeze(-1) >> shifts) & 1
    return spread.reshape(mask.shape[0], -1)[:, :columns].bool()


def row_starts(mask: Tensor) -> Tensor:
    """Where each row's values begin [rows], int64."""
    counts = bits(mask, mask.shape[1] * WORD).sum(1)
    return torch.cumsum(counts, 0) - counts
