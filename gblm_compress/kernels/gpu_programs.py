"""The GPU kernels of the packed layouts, in Triton; `gpu` starts them.

A program computes some output rows over a share of the columns: it reads a block of the packed weight, restores it in
registers, and multiplies it by the inputs, on ordinary arithmetic units for one or two tokens and on tensor cores for
more. Where rows are few the columns are shared by several programs, whose partial sums are added up in a fixed order.
"""

import triton
import triton.language as tl


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
def linear(  # type: ignore[no-untyped-def]
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
def add_up(  # type: ignore[no-untyped-def]
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
def expand(  # type: ignore[no-untyped-def]
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
