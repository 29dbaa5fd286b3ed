"""The GPU kernels of the packed layouts, in Triton: few tokens, fp16 and bf16, reading only packed bytes.

A program computes some output rows over a share of the columns: it reads a block of the packed weight, restores it in
registers, and multiplies it by the inputs, on ordinary arithmetic units for one or two tokens and on tensor cores for
more. Where rows are few the columns are shared by several programs, whose partial sums are added up in a fixed order.
In the bitmask layout the running sum of the bits says where each weight's value lies; `block_starts` says where the
values of each block begin, so that blocks do not wait for each other.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gblm_compress.kernels.masks import WORD, bits, row_starts

MAX_TOKENS = 64
GRAIN = 256  # columns between two block starts of the bitmask layout; they add 32 bits to 256 weights
OPTIONS = {"enable_fp_fusion": True}  # multiply and add at once; Triton's default changes between versions
SUMMED_AT_ONCE = 1024  # outputs whose partial sums one program adds up


class Tiling(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        rows, columns: of the weight's block that a program restores at a time.
        warps: that share the block.
        tensor_cores: whether they multiply, else ordinary arithmetic units.
        programs: the columns are shared by several programs until about so many run.
    """

    rows: int
    columns: int
    warps: int
    tensor_cores: bool
    programs: int


TILINGS = {
    "sparse24": (
        Tiling(4, 1024, 4, False, 1),
        Tiling(4, 512, 4, False, 1024),
        Tiling(2, 1024, 4, False, 1),
        Tiling(8, 512, 4, False, 1),
        Tiling(16, 256, 4, True, 512),
        Tiling(16, 256, 4, True, 1),
        Tiling(32, 256, 4, True, 512),
        Tiling(64, 128, 4, True, 512),
    ),
    "bitmask": (
        Tiling(4, GRAIN, 4, False, 1),
        Tiling(4, GRAIN, 4, False, 1024),
        Tiling(8, GRAIN, 4, False, 1),
        Tiling(2, GRAIN, 2, False, 1),
        Tiling(16, GRAIN, 4, True, 512),
        Tiling(16, GRAIN, 4, True, 1),
        Tiling(32, GRAIN, 8, True, 512),
    ),
}


class Packed(NamedTuple):
    """A packed weight as the kernels read it.

    Attributes:
        layout: "sparse24" or "bitmask".
        values: [rows, columns / 2], or [nonzeros + padding]; float16 or bfloat16.
        places: positions [rows, ceil(columns / 8)] in uint8, or mask [rows, words] in int64.
        starts: `block_starts` of a bitmask; not read for sparse24.
        shape: (rows, columns).
    """

    layout: str
    values: Tensor
    places: Tensor
    starts: Tensor
    shape: tuple[int, int]


def block_starts(mask: Tensor) -> Tensor:
    """Where the values of every `GRAIN` columns of a row begin.

    Args:
        mask: [rows, words], int64.

    Returns:
        [rows, ceil(words / (GRAIN / 64))], int32.
    """
    words = GRAIN // WORD
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % words))
    counts = bits(padded, padded.shape[1] * WORD).reshape(len(mask), -1, GRAIN).sum(-1)
    return (row_starts(mask).unsqueeze(1) + counts.cumsum(1) - counts).to(torch.int32).contiguous()


def tilings(layout: str, tokens: int) -> list[Tiling]:
    """The tilings that take so many tokens."""
    if tokens > MAX_TOKENS:
        return []
    return [tiling for tiling in TILINGS[layout] if tokens <= 2 or tiling.tensor_cores]


def linear(x: Tensor, weight: Packed, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """x Wᵀ + b, accumulated in float32 and rounded once.

    Args:
        x: [tokens, columns], 1 to `MAX_TOKENS` tokens, in the dtype of the values.
        tiling: one that takes so many tokens.

    Returns:
        [tokens, rows] in the dtype of x.
    """
    tokens, (rows, columns) = x.shape[0], weight.shape
    blocks, programs = triton.cdiv(columns, tiling.columns), triton.cdiv(rows, tiling.rows)
    share = triton.cdiv(blocks, max(1, min(blocks, tiling.programs // programs)))
    splits = triton.cdiv(blocks, share)
    y = x.new_empty(tokens, rows)
    partial = y if splits == 1 else x.new_empty(splits, tokens, rows, dtype=torch.float32)
    given = y if bias is None else bias
    _linear[(programs, splits)](
        x.contiguous(),
        *_pointers(weight),
        given,
        partial,
        rows,
        columns,
        weight.places.shape[1],
        weight.starts.shape[-1],
        tokens,
        share,
        BITMASK=weight.layout == "bitmask",
        TENSOR_CORES=tiling.tensor_cores,
        BIAS=bias is not None and splits == 1,
        TOKENS=max(triton.next_power_of_2(tokens), 16 if tiling.tensor_cores else 1),
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        num_warps=tiling.warps,
        **OPTIONS,
    )
    if splits > 1:
        _add_up[(triton.cdiv(tokens * rows, SUMMED_AT_ONCE),)](
            partial,
            given,
            y,
            tokens * rows,
            rows,
            BIAS=bias is not None,
            SPLITS=splits,
            BLOCK=SUMMED_AT_ONCE,
            **OPTIONS,
        )
    return y


def expand(weight: Packed) -> Tensor:
    """The dense weight [rows, columns], bit for bit."""
    rows, columns = weight.shape
    dense = weight.values.new_empty(rows, columns)
    _expand[(triton.cdiv(rows, 8), triton.cdiv(columns, GRAIN))](
        *_pointers(weight),
        dense,
        rows,
        columns,
        weight.places.shape[1],
        weight.starts.shape[-1],
        BITMASK=weight.layout == "bitmask",
        ROWS=8,
        COLUMNS=GRAIN,
        **OPTIONS,
    )
    return dense


def _pointers(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places and starts as the kernels read them: sparse24 by pairs of values, the mask by words of 32 bits."""
    if weight.layout == "bitmask":
        return weight.values, weight.places.view(torch.int32), weight.starts
    return weight.values.view(torch.int32), weight.places, weight.starts


@triton.jit  # type: ignore[untyped-decorator]
def _sparse24_block(  # type: ignore[no-untyped-def]
    values, positions, row, first_column, rows, columns, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The bits of a block [ROWS, COLUMNS] in int16: what stands in each column is one of two values, or nothing."""
    group = first_column // 4 + tl.arange(0, COLUMNS // 4)
    inside = (row < rows)[:, None] & (group < columns // 4)[None, :]
    line = row.to(tl.int64)[:, None]
    pair = tl.load(values + line * (columns // 4) + group[None, :], mask=inside, other=0)
    two_groups = tl.load(positions + line * width + group[None, :] // 2, mask=inside, other=0).to(tl.int32)
    nibble = two_groups >> (group % 2 * 4)[None, :]
    one, two = nibble & 3, (nibble >> 2) & 3
    low, high = pair & 0xFFFF, pair >> 16
    column_0 = tl.where(one == 0, low, 0)
    column_1 = tl.where(one == 1, low, tl.where(two == 1, high, 0))
    column_2 = tl.where(one == 2, low, tl.where(two == 2, high, 0))
    column_3 = tl.where(two == 3, high, 0)
    even, odd = tl.interleave(column_0, column_2), tl.interleave(column_1, column_3)
    return tl.interleave(even, odd).to(tl.int16)


@triton.jit  # type: ignore[untyped-decorator]
def _bitmask_block(  # type: ignore[no-untyped-def]
    values, mask, starts, row, first_column, rows, columns, width, blocks, COLUMNS: tl.constexpr
):
    """A block [ROWS, COLUMNS] of the weight; COLUMNS is the grain of the starts."""
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    line = row.to(tl.int64)[:, None]
    word = tl.load(mask + line * (width * 2) + column[None, :] // 32, mask=inside, other=0)
    bit = (word >> (column % 32)[None, :]) & 1
    start = tl.load(starts + row.to(tl.int64) * blocks + first_column // COLUMNS, mask=row < rows, other=0)
    place = start[:, None] + tl.cumsum(bit, 1) - bit
    return tl.load(values + place, mask=bit == 1, other=0.0)


# One compilation serves every number of tokens and of blocks, where these would be special at 1 and at multiples of 16.
@triton.jit(do_not_specialize=["blocks", "tokens", "share"])  # type: ignore[untyped-decorator]
def _linear(  # type: ignore[no-untyped-def]
    x,
    values,
    places,
    starts,
    bias,
    y,
    rows,
    columns,
    width,
    blocks,
    tokens,
    share,
    BITMASK: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    if TENSOR_CORES:
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    else:
        total = tl.zeros((TOKENS, ROWS, COLUMNS), dtype=tl.float32)
    begin = split * share * COLUMNS
    for first_column in range(begin, min(begin + share * COLUMNS, columns), COLUMNS):
        if BITMASK:
            weight = _bitmask_block(values, places, starts, row, first_column, rows, columns, width, blocks, COLUMNS)
        else:
            block = _sparse24_block(values, places, row, first_column, rows, columns, width, ROWS, COLUMNS)
            weight = block.to(x.dtype.element_ty, bitcast=True)
        column = first_column + tl.arange(0, COLUMNS)
        inputs = tl.load(
            x + token[:, None] * columns + column[None, :],
            mask=(token < tokens)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        if TENSOR_CORES:
            total = tl.dot(weight, tl.trans(inputs), total)
        else:
            total += inputs.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    # `product`, since a name keeps one shape for Triton
    product = tl.trans(total) if TENSOR_CORES else tl.sum(total, 2)
    if BIAS:
        product += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    place = (split * tokens + token)[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(y + place, product.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(  # type: ignore[no-untyped-def]
    partial, bias, y, outputs, rows, BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * outputs + place, mask=place < outputs, other=0.0)
    if BIAS:
        total += tl.load(bias + place % rows, mask=place < outputs, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=place < outputs)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    values,
    places,
    starts,
    dense,
    rows,
    columns,
    width,
    blocks,
    BITMASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    if BITMASK:
        weight = _bitmask_block(values, places, starts, row, first_column, rows, columns, width, blocks, COLUMNS)
    else:
        block = _sparse24_block(values, places, row, first_column, rows, columns, width, ROWS, COLUMNS)
        weight = block.to(dense.dtype.element_ty, bitcast=True)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dense + row.to(tl.int64)[:, None] * columns + column[None, :], weight, mask=inside)
