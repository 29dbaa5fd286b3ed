"""Products of quantised weights on a CPU, and from how many tokens on restored tiles are the faster way.

As in `bitmask_cpu` that is measured once for each shape, dtype, thread count and machine, and kept.
"""

import torch
from torch import Tensor

from gblm_compress.kernels import cpu, cpu_quantised
from gblm_compress.kernels.cpu_quantised import Quantised
from gblm_compress.layouts.bitmask_cpu import TILE_BYTES, measured_crossover

EVERY = 1 << 40
"""A crossover: the kernel is the faster one for any number of tokens."""
_TRIED = (256, 64, 16, 8, 4, 2, 1)  # tokens
_TRIED_ROWS = 1024


def linear_by_tiles(x: Tensor, weight: Quantised) -> Tensor:
    """x Wᵀ for any number of tokens: tiles of rows restored into one buffer, each multiplied densely."""
    rows, columns = weight.rows, weight.columns
    size = min(rows, max(16, TILE_BYTES // (columns * x.element_size())))
    tile = cpu.scratch(size * columns * x.element_size()).view(x.dtype).view(size, columns)
    parts = [
        x @ cpu_quantised.restore(weight, first, tile[: min(size, rows - first)]).T for first in range(0, rows, size)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def crossover(name: str, weight: Quantised, dtype: torch.dtype) -> int:
    """The largest number of tokens, of those that are tried, for which the kernel beats tiles; `EVERY` after all."""
    part = weight.first_rows(_TRIED_ROWS)
    shape = f"{name} {weight.rows}x{weight.columns}/{weight.group} {dtype} {torch.get_num_threads()}"
    tokens = measured_crossover(
        f"{shape} {cpu.path(torch.int8)}",
        _TRIED,
        lambda tokens: torch.ones(tokens, weight.columns, dtype=dtype),
        lambda x: cpu_quantised.linear(x, part),
        lambda x: linear_by_tiles(x, part),
    )
    return EVERY if tokens == _TRIED[0] else tokens


def linear(x: Tensor, weight: Quantised, bias: Tensor | None, crossover: int, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b: on the kernel up to so many tokens, beyond by tiles of restored rows."""
    if x.dtype != dtype:
        raise ValueError(f"x is {x.dtype}; the layer's dtype is {dtype}")
    flat = x.reshape(-1, weight.columns)
    y = cpu_quantised.linear(flat, weight) if len(flat) <= crossover else linear_by_tiles(flat, weight)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.rows)
