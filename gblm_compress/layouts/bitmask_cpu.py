"""The bitmask product of many tokens on a CPU, and from how many tokens on it is the faster one.

Up to 8 tokens run on the sparse kernel for decoding, more on the one for many tokens. Where a CPU has none of the
latter for the dtype, more are computed in tiles: some rows are expanded into a buffer that is used again and again, and
multiplied by torch's dense GEMM. Where the one overtakes the other below 8 tokens is measured once for each shape,
dtype, thread count and machine, and kept in the cache folder.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from gblm_compress.kernels import cpu
from gblm_compress.machine.measurements import remembered

Make = Callable[[int], Tensor]
Product = Callable[[Tensor], Tensor]
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
    return measured_crossover(
        f"{mask.shape[0]}x{columns} {values.dtype} {torch.get_num_threads()} {cpu.path(values.dtype)}",
        range(cpu.FEW_TOKENS, 0, -1),
        lambda tokens: torch.ones(tokens, columns, dtype=values.dtype),
        lambda x: cpu.linear(x, mask, values, starts),
        lambda x: linear_many(x, mask, values, starts),
    )


def measured_crossover(shape: str, tried: Sequence[int], make: Make, few: Product, many: Product) -> int:
    """The largest number of tokens, of those `tried` from the largest to 1, for which `few` is as fast as `many`.

    Args:
        shape: what the result depends on beside the machine; under it, it is kept.
        make: x for so many tokens.
    """
    return remembered(
        _machine(),
        f"crossover {shape}",
        lambda: measure_crossover(tried, make, few, many),
        lambda tokens: type(tokens) is int and tokens in tried,
    )


@cache
def _machine() -> str:
    from gblm_compress.machine.environment import cpu_name

    kernels = cpu.library_file()
    which = "none" if kernels is None else f"{crc32(kernels.read_bytes()):08x}"
    return f"{cpu_name()}, torch {torch.__version__}, kernels {which}"


def measure_crossover(tried: Sequence[int], make: Make, few: Product, many: Product) -> int:
    for tokens in tried:
        x = make(tokens)
        if tokens == 1 or _best_time(few, x) <= _best_time(many, x):
            return tokens
    return tried[-1]


def _best_time(product: Product, x: Tensor) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        product(x)
        times.append(time.perf_counter() - start)
    return min(times[1:])
