"""The bitmask product of many tokens on a CPU, and from how many tokens on it is the faster one.

Up to 8 tokens run on the sparse kernel for decoding, more on the one for many tokens. Where a CPU has none of the
latter for the dtype, more are computed in tiles: some rows are expanded into a buffer that is used again and again, and
multiplied by torch's dense GEMM. Where the one overtakes the other below 8 tokens is measured once for each shape,
dtype, thread count and machine, and kept in the cache folder.
"""

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gblm_compress.kernels import cpu
from gblm_compress.machine.measurements import remembered

TILE_BYTES = 8 << 20  # of an expanded tile: large enough for an efficient GEMM, small beside the model


def linear_many(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """x Wᵀ for many tokens: on the kernel for them where this CPU has one for the dtype, else by tiles."""
    if cpu.has_many(values.dtype, cpu.path(values.dtype)):
        return cpu.linear(x, mask, values, starts, many=True)
    return linear_by_tiles(x, mask, values, starts)


def linear_by_tiles(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """x Wᵀ for any number of tokens: tiles of rows expanded into one buffer, each multiplied densely.

    Args:
        x: [tokens, columns] in the dtype of `values`.
        mask, values, starts: the packed weight [rows, columns].

    Returns:
        [tokens, rows] in the dtype of `x`.
    """
    rows, columns = mask.shape[0], x.shape[1]
    size = min(rows, max(16, TILE_BYTES // (columns * values.element_size())))
    tile = cpu.scratch(size * columns * values.element_size()).view(values.dtype).view(size, columns)
    parts = []
    for first in range(0, rows, size):
        part = cpu.expand(mask, values, starts, columns, first, tile[: min(size, rows - first)])
        parts.append(x @ part.T)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def crossover(mask: Tensor, values: Tensor, starts: Tensor, columns: int) -> int:
    """The largest number of tokens, up to 8, for which the sparse kernel beats expanding tiles for this shape."""
    shape = f"{mask.shape[0]}x{columns} {values.dtype} {torch.get_num_threads()} {cpu.path(values.dtype)}"
    return remembered(
        _machine(),
        f"crossover {shape}",
        lambda: measure_crossover(mask, values, starts, columns),
        lambda tokens: type(tokens) is int and 1 <= tokens <= cpu.FEW_TOKENS,
    )


@cache
def _machine() -> str:
    from gblm_compress.machine.environment import cpu_name

    return f"{cpu_name()}, torch {torch.__version__}"


def measure_crossover(mask: Tensor, values: Tensor, starts: Tensor, columns: int) -> int:
    for tokens in range(cpu.FEW_TOKENS, 1, -1):
        x = torch.ones(tokens, columns, dtype=values.dtype)
        if _best_time(cpu.linear, x, mask, values, starts) <= _best_time(linear_many, x, mask, values, starts):
            return tokens
    return 1


def _best_time(function: Any, *arguments: Any) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times[1:])
