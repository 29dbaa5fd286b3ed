"""The CPU kernels of quantised weights: products, by eight tokens, and the restoration of rows. See quantised.c."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gblm_compress.kernels.cpu import DTYPES, PATHS, library, path, scratch
from gblm_compress.kernels.masks import WORD

MOST_COLUMNS = 1024 * WORD  # of a row; integers would overflow beyond


@dataclass(frozen=True)
class Quantised:
    """A weight [rows, columns] as kernels read it; what its layout's `check` has passed.

    Attributes:
        values: int8 levels, or uint8 with two places in `levels` a byte; with a mask those of its bits in order,
            without one those of all weights, [rows, words·64].
        scales: [rows, groups], the bits of float16 as int16.
        sums: as `row_sums` makes them.
        columns: of the weight.
        group: columns that share a scale; 0 where all of a row do.
        mask, starts: [rows, words] int64, and the byte at which each row begins; None where all weights are stored, and
            with patterns.
        levels: [1, 16] or [rows, 16] in int8; None where values are levels.
        patterns: [rows, words·6] in uint8, as `kernels.patterns` makes them; None where the weight is not 2:4.
    """

    values: Tensor
    scales: Tensor
    sums: Tensor
    columns: int
    group: int
    mask: Tensor | None = None
    starts: Tensor | None = None
    levels: Tensor | None = None
    patterns: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.scales.shape[0]

    @property
    def words(self) -> int:
        return -(-self.columns // WORD)

    def first_rows(self, count: int) -> "Quantised":
        """The first rows, of the same memory."""
        rows = ("mask", "starts", "levels", "patterns")
        held = {name: tensor for name in rows if (tensor := getattr(self, name)) is not None}
        part = {name: tensor[: max(count, 2)] for name, tensor in held.items()}
        return replace(self, scales=self.scales[:count], sums=self.sums[:count], **part)

    @property
    def stride(self) -> int:
        """From a row's levels to the next row's."""
        return 0 if self.levels is None or len(self.levels) == 1 else 16


def linear(x: Tensor, weight: Quantised, kernel: str | None = None) -> Tensor:
    """x Wᵀ; x is rounded to 16 bits with one scale for each token, the rest is exact or in float32.

    Args:
        x: [tokens, columns] in float32, float16 or bfloat16.
        kernel: one of `paths(torch.int8)`; the best one if unset.

    Returns:
        [tokens, rows] in the dtype of `x`.

    Raises:
        ValueError: x is no such tensor, or there is no such kernel.
    """
    kernels = library()
    assert kernels is not None
    tokens, columns = x.shape
    if not x.is_cpu or x.dtype not in DTYPES or columns != weight.columns:
        raise ValueError(f"x is {x.dtype} on {x.device} with {columns} columns; the weight has {weight.columns}")
    x = x.contiguous()
    y = x.new_empty(tokens, weight.rows)
    if tokens == 0:
        return y
    words, kernel = weight.words, kernel or path(torch.int8)
    done = kernels.gblm_quantised_linear(
        _address(weight.mask),
        _address(weight.patterns),
        weight.values.data_ptr(),
        _address(weight.starts),
        _address(weight.levels),
        weight.scales.data_ptr(),
        weight.sums.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        scratch(kernels.gblm_quantised_bytes(words, tokens)).data_ptr(),
        weight.rows,
        words,
        columns,
        tokens,
        weight.stride,
        weight.group,
        DTYPES[x.dtype],
        PATHS.index(kernel),
        torch.get_num_threads(),
    )
    if not done:
        raise ValueError(f"no kernel {kernel} for {columns} columns")
    return y


def restore(weight: Quantised, first: int, out: Tensor, kernel: str | None = None) -> Tensor:
    """Rows `first` … `first + len(out)` of the weight, dense, written into `out` [count, columns].

    Raises:
        ValueError: the weight has no such rows, or `out` is no such tensor.
    """
    kernels = library()
    assert kernels is not None
    if (
        not 0 <= first <= first + len(out) <= weight.rows
        or not (out.is_cpu and out.is_contiguous() and out.dtype in DTYPES)
        or out.shape[1:] != (weight.columns,)
    ):
        raise ValueError(f"rows {first} to {first + len(out)} of {weight.rows} into {out.dtype} {list(out.shape)}")
    kernel = kernel or path(torch.int8)
    done = kernels.gblm_quantised_restore(
        _address(weight.mask),
        _address(weight.patterns),
        weight.values.data_ptr(),
        _address(weight.starts),
        _address(weight.levels),
        weight.scales.data_ptr(),
        out.data_ptr(),
        first,
        out.shape[0],
        weight.words,
        weight.columns,
        weight.stride,
        weight.group,
        DTYPES[out.dtype],
        PATHS.index(kernel),
        torch.get_num_threads(),
    )
    if not done:
        raise ValueError(f"no kernel {kernel} for {weight.columns} columns")
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
