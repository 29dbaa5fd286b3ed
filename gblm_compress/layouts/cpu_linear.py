"""Products with packed weights on a CPU: by a kernel that reads packed bytes, or by expanded tiles and a dense product.

Tiles win for many tokens, unless there is a kernel for many. The crossover is measured once for each shape, dtype,
thread count and machine, and kept in the cache folder.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from timeit import repeat
from zlib import crc32

import torch
from torch import Tensor

from gblm_compress.kernels import cpu
from gblm_compress.machine import cpu_name, remembered

TILE_BYTES = 8 << 20  # of an expanded tile: large enough for an efficient GEMM, small beside the model
EVERY = 1 << 40  # the crossover of a kernel that is faster for any number of tokens


def linear(x: Tensor, weight: cpu.Weight, bias: Tensor | None, crossover: int) -> Tensor:
    """x Wᵀ + b, [..., rows] for x [..., columns], else ValueError: on the kernel for up to `crossover` tokens."""
    if x.dtype != weight.dtype or x.shape[-1:] != (weight.columns,):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; the weight is {weight.dtype} with {weight.columns} columns")
    flat = x.reshape(-1, weight.columns)
    y = weight.linear(flat) if len(flat) <= crossover else linear_many(flat, weight)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.rows)


def linear_many(x: Tensor, weight: cpu.Weight) -> Tensor:
    return weight.linear(x, many=True) if weight.has_many else linear_by_tiles(x, weight)


def linear_by_tiles(x: Tensor, weight: cpu.Weight) -> Tensor:
    """x Wᵀ: tiles of rows are expanded into one buffer and multiplied densely."""
    rows, columns = weight.rows, weight.columns
    size = min(rows, max(16, TILE_BYTES // (columns * x.element_size())))
    tile = cpu.scratch(size * columns * x.element_size()).view(x.dtype).view(size, columns)
    parts = [x @ weight.expand(first, tile[: min(size, rows - first)]).T for first in range(0, rows, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def kernel(weight: cpu.Weight, layout: str, tokens: int, crossover: int) -> str:
    if tokens <= crossover:
        return f"{layout} {weight.path}"
    return f"{layout} {weight.path}, many tokens" if weight.has_many else "expanded tiles and dense GEMM"


def crossover(layout: str, weight: cpu.Weight) -> int:
    """The largest number of tokens, among `weight.tried`, for which the kernel is as fast as `linear_many`."""
    group = f"/{weight.group}" if isinstance(weight, cpu.Quantised) else ""
    shape = f"{weight.rows}x{weight.columns}{group} {weight.dtype} {torch.get_num_threads()} {weight.path}"
    tokens = remembered(
        _machine(),
        f"crossover {layout} {shape}",
        lambda: measure_crossover(weight),
        lambda tokens: type(tokens) is int and tokens in weight.tried,
    )
    return EVERY if tokens > cpu.FEW_TOKENS and tokens == weight.tried[0] else tokens


@cache
def _machine() -> str:
    kernels = cpu.library_file()
    which = "none" if kernels is None else f"{crc32(kernels.read_bytes()):08x}"
    return f"{cpu_name()}, torch {torch.__version__}, kernels {which}"


def measure_crossover(weight: cpu.Weight) -> int:
    part = weight
    if isinstance(weight, cpu.Quantised):
        part = replace(weight, scales=weight.scales[:1024], sums=weight.sums[:1024])
    for tokens in weight.tried:
        x = torch.ones(tokens, weight.columns, dtype=weight.dtype)
        if tokens == 1 or _best_time(part.linear, x) <= _best_time(lambda x: linear_many(x, part), x):
            return tokens
    return 1


def _best_time(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    return min(repeat(lambda: product(x), number=1, repeat=4)[1:])
