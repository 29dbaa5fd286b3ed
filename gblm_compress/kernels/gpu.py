"""Products of the packed layouts on the GPU: few tokens, fp16 and bf16, reading only packed bytes.

`gpu_programs` has the Triton code; here is how a product is cut into programs. In the bitmask layout the running sum of
the bits says where each weight's value lies; `block_starts` says where the values of each block begin, so that blocks
do not wait for each other.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gblm_compress.kernels import gpu_programs
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
    gpu_programs.linear[(programs, splits)](
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
        gpu_programs.add_up[(triton.cdiv(tokens * rows, SUMMED_AT_ONCE),)](
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
    gpu_programs.expand[(triton.cdiv(rows, 8), triton.cdiv(columns, GRAIN))](
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
