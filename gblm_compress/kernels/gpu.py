"""The GPU kernel of the bitmask layout, in Triton: decoding, 1 to 16 tokens, reading only packed bytes.

A program computes one output row over one share of the columns. It expands a block of the mask to bits; the running
sum of the bits says where each weight's value lies. Where rows are few the columns are split over several programs,
whose partial sums are added up afterwards in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gblm_compress.bitmask import WORD

MAX_TOKENS = 16
BLOCK = 512  # columns that a program expands at a time
ENOUGH_PROGRAMS = 2048  # about what fills a large GPU; fewer rows than that are split along the columns


def split_starts(mask: Tensor, starts: Tensor, columns: int) -> Tensor:
    """Where the values of each row's shares of columns begin.

    Args:
        mask: [rows, words], int64.
        starts: where each row's values begin [rows].
        columns: width of the weight.

    Returns:
        [rows, splits], int32; the number of splits follows from the shape.
    """
    rows, words = mask.shape
    blocks = -(-columns // BLOCK)
    splits = max(1, min(blocks, ENOUGH_PROGRAMS // rows))
    per_split = -(-blocks // splits) * BLOCK // WORD
    counts = _popcount(mask).to(torch.int64)
    padded = torch.nn.functional.pad(counts, (0, -words % per_split)).reshape(rows, -1, per_split).sum(-1)
    return (starts.unsqueeze(1) + padded.cumsum(1) - padded).to(torch.int32).contiguous()


def linear(x: Tensor, mask: Tensor, values: Tensor, shares: Tensor) -> Tensor:
    """x Wᵀ, accumulated in float32.

    Args:
        x: [tokens, columns], 1 to 16 tokens, float16 or bfloat16.
        mask, values: the packed weight [rows, columns].
        shares: `split_starts` of it.

    Returns:
        [tokens, rows] in float32.
    """
    tokens, columns = x.shape
    rows, splits = shares.shape
    blocks = -(-columns // BLOCK)
    partial = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    _bitmask_linear[(rows, splits)](
        mask.view(torch.int32),
        values,
        shares,
        x.contiguous(),
        partial,
        rows,
        columns,
        mask.shape[1] * 2,
        tokens,
        -(-blocks // splits) * BLOCK,
        SPLITS=splits,
        TOKENS=triton.next_power_of_2(tokens),
        BLOCK_SIZE=BLOCK,
    )
    return partial.sum(0)


@triton.jit  # type: ignore[untyped-decorator]
def _bitmask_linear(  # type: ignore[no-untyped-def]
    mask,
    values,
    shares,
    x,
    partial,
    rows,
    columns,
    words,
    tokens,
    share,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    next_value = tl.load(shares + row * SPLITS + split)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    first = split * share
    for begin in range(first, min(first + share, columns), BLOCK_SIZE):
        column = begin + tl.arange(0, BLOCK_SIZE)
        inside = column < columns
        word = tl.load(mask + row.to(tl.int64) * words + column // 32, mask=inside, other=0)
        bit = (word >> (column % 32)) & 1
        place = tl.cumsum(bit, 0)
        weight = tl.load(values + next_value + place - 1, mask=bit == 1, other=0.0).to(tl.float32)
        inputs = tl.load(
            x + token[:, None] * columns + column[None, :],
            mask=(token[:, None] < tokens) & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(inputs * weight[None, :], axis=1)
        next_value += tl.sum(bit, 0)
    tl.store(partial + (split * tokens + token) * rows + row, total, mask=token < tokens)


def _popcount(mask: Tensor) -> Tensor:
    """The set bits of each word, [rows, words]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.view(torch.uint8).reshape(*mask.shape, 8, 1) >> shifts) & 1
    return bits.sum((-1, -2))
