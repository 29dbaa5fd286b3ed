"""Products with packed weights on a GPU: few tokens in 16 bit, reading only packed bytes.

`gpu_programs` has the Triton code; this module cuts a product into programs. With a mask the running sum of the bits
gives the place of each value, and `block_starts` the first place of each block.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gblm_compress.kernels import gpu_programs
from gblm_compress.kernels.masks import WORD, starts_of, word_counts

MAX_TOKENS = 64
GRAIN = 256  # columns between two block starts of the bitmask layout; they add 32 bits to 256 weights
OPTIONS = {"enable_fp_fusion": True}  # multiply and add at once; Triton's default changes between versions
SUMMED_AT_ONCE = 1024  # outputs whose partial sums one program adds up


class Tiling(NamedTuple):
    """How a product is cut into programs."""

    rows: int  # of the block that a program restores at a time
    columns: int
    warps: int  # that share the block
    tensor_cores: bool  # else ordinary arithmetic units
    programs: int  # several programs share the columns until about this many run


_TWO_OF_FOUR = (
    Tiling(4, 1024, 4, False, 1),
    Tiling(4, 512, 4, False, 1024),
    Tiling(2, 1024, 4, False, 1),
    Tiling(8, 512, 4, False, 1),
    Tiling(16, 256, 4, True, 512),
    Tiling(16, 256, 4, True, 1),
    Tiling(32, 256, 4, True, 512),
    Tiling(64, 128, 4, True, 512),
)
_MASK = (
    Tiling(4, GRAIN, 4, False, 1),
    Tiling(4, GRAIN, 4, False, 1024),
    Tiling(8, GRAIN, 4, False, 1),
    Tiling(2, GRAIN, 2, False, 1),
    Tiling(16, GRAIN, 4, True, 512),
    Tiling(16, GRAIN, 4, True, 1),
    Tiling(32, GRAIN, 8, True, 512),
)


TILINGS = {"mask": _MASK, "two of four": _TWO_OF_FOUR, "all": _TWO_OF_FOUR}  # {stored weights: tilings to try}


class Packed(NamedTuple):
    """A packed weight as the kernels read it."""

    layout: str  # its name, for messages and kept measurements
    stored: str  # a key of `TILINGS`
    width: int  # bits of a stored weight
    values: Tensor  # as the layout stores them; in 16 bits float16 or bfloat16
    places: Tensor  # mask [rows, words] in int64, positions [rows, bytes] in uint8, or unread
    starts: Tensor  # `block_starts` of a mask; unread without one
    shape: tuple[int, int]
    dtype: torch.dtype  # of x, and of restored weights
    scales: Tensor | None = None  # [rows, groups], the bits of float16 as int16; None for 16 bits
    levels: Tensor | None = None  # the table of int4 [1 or rows, 16] in int8; None for int8
    group: int = 0  # columns that share a scale; 0: all of a row


def block_starts(mask: Tensor, whole_bytes: bool = False) -> Tensor:
    """Where the values of every `GRAIN` columns begin, [rows, ceil(words · 64 / GRAIN)] in int32.

    The mask is [rows, words] in int64. With `whole_bytes`, values are half bytes, and each word begins a new byte.
    """
    counts = word_counts(mask.flatten())
    if whole_bytes:
        counts += counts % 2
    return starts_of(counts).reshape(mask.shape)[:, :: GRAIN // WORD].to(torch.int32).contiguous()


def tilings(stored: str, tokens: int) -> list[Tiling]:
    if tokens > MAX_TOKENS:
        return []
    return [tiling for tiling in TILINGS[stored] if tokens <= 2 or tiling.tensor_cores]


def linear(x: Tensor, weight: Packed, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """x Wᵀ + b [tokens, rows], accumulated in float32 and rounded once, for x [tokens, columns] in the weight's dtype.

    `tiling` is one of `tilings` for that many tokens.
    """
    tokens, (rows, columns) = x.shape[0], weight.shape
    blocks, programs = triton.cdiv(columns, tiling.columns), triton.cdiv(rows, tiling.rows)
    share = triton.cdiv(blocks, max(1, min(blocks, tiling.programs // programs)))
    splits = triton.cdiv(blocks, share)
    y = x.new_empty(tokens, rows)
    partial = y if splits == 1 else x.new_empty(splits, tokens, rows, dtype=torch.float32)
    given = y if bias is None else bias
    tensors, sizes, constants = _arguments(weight)
    constants |= {
        "TENSOR_CORES": tiling.tensor_cores,
        "BIAS": bias is not None and splits == 1,
        "TOKENS": max(triton.next_power_of_2(tokens), 16 if tiling.tensor_cores else 1),
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
    }
    arguments = x.contiguous(), *tensors, given, partial, *sizes, tokens, share
    gpu_programs.linear[(programs, splits)](*arguments, **constants, num_warps=tiling.warps, **OPTIONS)
    if splits > 1:
        outputs, constants = tokens * rows, {"BIAS": bias is not None, "SPLITS": splits, "BLOCK": SUMMED_AT_ONCE}
        grid = (triton.cdiv(outputs, SUMMED_AT_ONCE),)
        gpu_programs.add_up[grid](partial, given, y, outputs, rows, **constants, **OPTIONS)
    return y


def expand(weight: Packed) -> Tensor:
    """The dense weight [rows, columns], bit for bit."""
    rows, columns = weight.shape
    dense = weight.values.new_empty(rows, columns, dtype=weight.dtype)
    tensors, sizes, constants = _arguments(weight)
    grid = (triton.cdiv(rows, 8), triton.cdiv(columns, GRAIN))
    gpu_programs.expand[grid](*tensors, dense, *sizes, **constants, ROWS=8, COLUMNS=GRAIN, **OPTIONS)
    return dense


def _arguments(weight: Packed) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The `tensors`, `sizes` and constants of `gpu_programs`. 2:4 values are read two at once, masks by 32 bits."""
    values, places = weight.values, weight.places
    if weight.stored == "mask":
        places = places.view(torch.int32)
    elif weight.stored == "two of four":
        values = values.view(torch.int32)
    # tensors that are not read may be any
    scales = values if weight.scales is None else weight.scales.view(torch.float16)
    levels = values if weight.levels is None else weight.levels
    strides = [
        0 if tensor is None or len(tensor) == 1 else tensor.shape[-1] for tensor in (weight.scales, weight.levels)
    ]
    sizes = *weight.shape, weight.places.shape[-1], weight.starts.shape[-1], *strides
    constants = {"STORED": weight.stored, "WIDTH": weight.width, "GROUP": weight.group}
    return (values, places, weight.starts, scales, levels), sizes, constants
