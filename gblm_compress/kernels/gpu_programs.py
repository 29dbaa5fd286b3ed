"""The GPU kernels of the packed layouts, in Triton; `gpu` starts them.

A program computes some output rows over a share of the columns. It restores a block of the packed weight in registers
and multiplies it by the inputs: on ordinary arithmetic units for one or two tokens, else on tensor cores. If rows
are few, several programs share the columns, and their partial sums are added in a fixed order.

`tensors` are values, places, starts, scales, levels; `sizes` are rows, columns, and the strides of the last four.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _sparse24_block(  # type: ignore[no-untyped-def]
    tensors, sizes, row, first_column, ELEMENT: tl.constexpr, COLUMNS: tl.constexpr
):
    """A block [ROWS, COLUMNS] of 16-bit values, which are moved as integers."""
    values, places, _, _, _ = tensors
    rows, columns, width, _, _, _ = sizes
    group = first_column // 4 + tl.arange(0, COLUMNS // 4)
    inside = (row < rows)[:, None] & (group < columns // 4)[None, :]
    line = row.to(tl.int64)[:, None]
    pair = tl.load(values + line * (columns // 4) + group[None, :], mask=inside, other=0)
    two_groups = tl.load(places + line * width + group[None, :] // 2, mask=inside, other=0).to(tl.int32)
    nibble = two_groups >> (group % 2 * 4)[None, :]
    one, two = nibble & 3, (nibble >> 2) & 3
    low, high = pair & 0xFFFF, pair >> 16
    column_0 = tl.where(one == 0, low, 0)
    column_1 = tl.where(one == 1, low, tl.where(two == 1, high, 0))
    column_2 = tl.where(one == 2, low, tl.where(two == 2, high, 0))
    column_3 = tl.where(two == 3, high, 0)
    even, odd = tl.interleave(column_0, column_2), tl.interleave(column_1, column_3)
    return tl.interleave(even, odd).to(tl.int16).to(ELEMENT, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _bitmask_block(  # type: ignore[no-untyped-def]
    tensors, sizes, row, first_column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """A block [ROWS, COLUMNS] of values or levels; COLUMNS is the grain of the starts."""
    values, mask, starts, _, levels = tensors
    rows, columns, width, blocks, _, stride = sizes
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    line = row.to(tl.int64)[:, None]
    word = tl.load(mask + line * (width * 2) + column[None, :] // 32, mask=inside, other=0)
    bit = (word >> (column % 32)[None, :]) & 1
    step = bit
    if WIDTH == 4:  # a word of 64 columns begins with a byte: after an odd number of places half a byte is empty
        odd = word ^ tl.load(mask + line * (width * 2) + (column[None, :] // 32 ^ 1), mask=inside, other=0)
        odd ^= odd >> 16
        odd ^= odd >> 8
        odd ^= odd >> 4
        odd ^= odd >> 2
        odd ^= odd >> 1
        step += tl.where((column % 64 == 63)[None, :], odd & 1, 0)
    start = tl.load(starts + row.to(tl.int64) * blocks + first_column // COLUMNS, mask=row < rows, other=0)
    place = start[:, None] + tl.cumsum(step, 1) - step
    if WIDTH == 4:
        two = tl.load(values + place // 2, mask=bit == 1, other=0).to(tl.int32)
        block = tl.load(levels + line * stride + (two >> (place % 2 * 4) & 15), mask=bit == 1, other=0)
    else:
        block = tl.load(values + place, mask=bit == 1, other=0)
    return block


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]
    tensors, sizes, row, first_column,
    ELEMENT: tl.constexpr, STORED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block [ROWS, COLUMNS] of the weight in ELEMENT: as it is stored, or scale · level, rounded once."""
    values, _, _, scales, _ = tensors
    rows, columns, _, _, groups, _ = sizes
    column = first_column + tl.arange(0, COLUMNS)
    line = row.to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if STORED == "mask":
        block = _bitmask_block(tensors, sizes, row, first_column, WIDTH, COLUMNS)
    elif STORED == "two of four":
        block = _sparse24_block(tensors, sizes, row, first_column, ELEMENT, COLUMNS)
    else:
        block = tl.load(values + line[:, None] * columns + column[None, :], mask=inside, other=0)
    if WIDTH == 16:
        weight = block
    else:
        if GROUP:
            scale = tl.load(scales + line[:, None] * groups + (column // GROUP)[None, :], mask=inside, other=0.0)
        else:
            scale = tl.load(scales + line, mask=row < rows, other=0.0)[:, None]
        weight = (block.to(tl.float32) * scale.to(tl.float32)).to(ELEMENT)
    return weight


# One compilation serves all sizes: Triton would specialise these at 1 and at multiples of 16.
@triton.jit(do_not_specialize=["blocks", "groups", "stride", "tokens", "share"])  # type: ignore[untyped-decorator]
def linear(  # type: ignore[no-untyped-def]
    x, values, places, starts, scales, levels, bias, y,
    rows, columns, width, blocks, groups, stride, tokens, share,
    STORED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, TENSOR_CORES: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    tensors, sizes = (values, places, starts, scales, levels), (rows, columns, width, blocks, groups, stride)
    if TENSOR_CORES:
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    else:
        total = tl.zeros((TOKENS, ROWS, COLUMNS), dtype=tl.float32)
    begin = split * share * COLUMNS
    for first_column in range(begin, min(begin + share * COLUMNS, columns), COLUMNS):
        weight = _block(tensors, sizes, row, first_column, x.dtype.element_ty, STORED, WIDTH, GROUP, COLUMNS)
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
    # not `total`: in Triton a name keeps its shape
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
    values, places, starts, scales, levels, dense,
    rows, columns, width, blocks, groups, stride,
    STORED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    tensors, sizes = (values, places, starts, scales, levels), (rows, columns, width, blocks, groups, stride)
    weight = _block(tensors, sizes, row, first_column, dense.dtype.element_ty, STORED, WIDTH, GROUP, COLUMNS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dense + row.to(tl.int64)[:, None] * columns + column[None, :], weight, mask=inside)
