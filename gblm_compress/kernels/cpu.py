"""The CPU kernels: the compiled library, its paths, torch's threads, and packed weights as the library reads them.

The library is plain C. An installation without a compiler has none. `GBLM_COMPRESS_KERNEL` forces one of `PATHS`,
here and in the operators for ONNX Runtime.
"""

import ctypes
import os
import sys
import threading
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gblm_compress.errors import MissingDependencyError, UsageError
from gblm_compress.kernels.masks import WORD

PATHS = ("portable", "neon", "neon-dot", "avx2", "avx-vnni", "vnni", "avx512", "amx")
PATH_VARIABLE = "GBLM_COMPRESS_KERNEL"
FEW_TOKENS = 8
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the library's numbers
_ONE = 0x3C00  # 1.0 in float16
_SUMMED = 1 << 21  # weights that are summed at once
_LIBRARY = Path(__file__).with_name(f"_bitmask{EXTENSION_SUFFIXES[-1]}")


def library_file() -> Path | None:
    return _LIBRARY if _LIBRARY.exists() else None


@cache
def library() -> Any:
    """The compiled kernels on torch's threads; None if the package was installed without a compiler."""
    found = library_file()
    if found is None:
        return None
    kernels = ctypes.CDLL(str(found))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernels.gblm_bitmask_linear.argtypes = [pointer] * 6 + [size] * 3 + [ctypes.c_int] * 3
    kernels.gblm_bitmask_expand.argtypes = [pointer] * 4 + [size] * 4 + [ctypes.c_int] * 3
    kernels.gblm_panel_bytes.argtypes, kernels.gblm_panel_bytes.restype = [size, size, ctypes.c_int], size
    kernels.gblm_quantised_bytes.argtypes, kernels.gblm_quantised_bytes.restype = [size, size], size
    kernels.gblm_quantised_linear.argtypes = [pointer] * 9 + [size] * 5 + [ctypes.c_int] * 4
    kernels.gblm_quantised_restore.argtypes = [pointer] * 6 + [size] * 5 + [ctypes.c_int] * 4
    kernels.gblm_set_parallel.argtypes = [pointer] * len(_OPENMP)
    kernels.gblm_set_parallel(*_openmp_of_torch())
    return kernels


def available() -> bool:
    return library() is not None


def onnxruntime_library() -> Path:
    """The file for `SessionOptions.register_custom_ops_library`; MissingDependencyError if it was not compiled."""
    found = library_file()
    if found is None:
        raise MissingDependencyError(
            "the operator for ONNX Runtime is missing: no C compiler was at hand when gblm-compress was installed. "
            "Install one (Debian, Ubuntu: `apt install gcc`), then reinstall with `pip install --force-reinstall "
            "--no-deps --no-cache-dir gblm-compress`, or `pip install --force-reinstall --no-deps .` in a checkout"
        )
    return found


@cache
def paths(dtype: torch.dtype) -> tuple[str, ...]:
    """The paths that this CPU can run for weights of `dtype` (int8 for all levels), slowest first."""
    kernels = library()
    if kernels is None:
        return ()
    supported = kernels.gblm_quantised_paths() if dtype is torch.int8 else kernels.gblm_paths(DTYPES[dtype])
    return tuple(name for index, name in enumerate(PATHS) if supported >> index & 1)


@cache
def path(dtype: torch.dtype) -> str:
    """The best path, or the one that `GBLM_COMPRESS_KERNEL` forces; UsageError if the CPU lacks that."""
    forced = os.environ.get(PATH_VARIABLE)
    if forced is None:
        return paths(dtype)[-1]
    if forced not in paths(dtype):
        raise UsageError(
            f"{PATH_VARIABLE}={forced}: this CPU has no such path for {dtype}; it has {', '.join(paths(dtype))}"
        )
    return forced


def spreads_places() -> bool:
    """Whether ONNX Runtime's operator spreads 4-bit weights at load; inputs of few tokens then have 8 bits, not 16."""
    return bool(library().gblm_spreads(PATHS.index(path.__wrapped__(torch.int8)), os.cpu_count() or 1, 1))


@cache
def has_many(dtype: torch.dtype, kernel: str) -> bool:
    """Whether the path has a kernel for more than `FEW_TOKENS` tokens of that dtype."""
    kernels = library()
    return kernels is not None and bool(kernels.gblm_has_many(DTYPES[dtype], PATHS.index(kernel)))


_buffers = threading.local()


def scratch(size: int) -> Tensor:
    """That many bytes, kept for this thread's next call: fresh pages would cost more than the writes."""
    held: Tensor | None = getattr(_buffers, "bytes", None)
    if held is None or held.numel() < size:
        held = _buffers.bytes = torch.empty(size, dtype=torch.uint8)
    return held[:size]


@dataclass(frozen=True)
class Bitmask:
    """A weight [rows, columns] in the bitmask layout, see job.h. Only for tensors that passed the layout's `check`."""

    mask: Tensor  # [rows, words], int64
    values: Tensor  # [nonzeros + padding]
    starts: Tensor  # `row_starts` of the mask
    columns: int
    tried = tuple(range(FEW_TOKENS, 0, -1))  # numbers of tokens for which `linear` is timed against expanded tiles

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, outputs and expanded rows."""
        return self.values.dtype

    @property
    def path(self) -> str:
        return path(self.values.dtype)

    @property
    def has_many(self) -> bool:
        return has_many(self.values.dtype, self.path)

    def linear(self, x: Tensor, kernel: str | None = None, *, many: bool = False) -> Tensor:
        """x Wᵀ, accumulated in float32: [tokens, rows] for x [tokens, columns], both in the dtype of the weight.

        `kernel` is one of `paths`, the best by default. `many` takes the kernel for many tokens, else for 1 to 8.
        ValueError if there is no such kernel.
        """
        kernels, tokens, (rows, words) = library(), len(x), self.mask.shape
        if self.columns != words * WORD:
            x = torch.nn.functional.pad(x, (0, words * WORD - self.columns))
        x = x.contiguous()
        y = x.new_empty(tokens, rows)
        if tokens == 0:
            return y
        codes = _codes(x.dtype, kernel)
        panels = scratch(kernels.gblm_panel_bytes(words, tokens, codes[0])) if many else None
        tensors = _at(self.mask, self.values, self.starts, x, y, panels)
        if not kernels.gblm_bitmask_linear(*tensors, rows, words, tokens, *codes, torch.get_num_threads()):
            raise ValueError(f"no kernel {kernel or self.path} for {tokens} tokens of {x.dtype} (many={many})")
        return y

    def expand(self, first: int, out: Tensor, kernel: str | None = None) -> Tensor:
        """Write rows from `first` on, dense, into `out` [count, columns]."""
        tensors = _at(self.mask, self.values, self.starts, out)
        sizes = first, len(out), self.columns, self.mask.shape[1], *_codes(out.dtype, kernel)
        if not library().gblm_bitmask_expand(*tensors, *sizes, torch.get_num_threads()):
            raise ValueError(f"no kernel {kernel or self.path} for {self.columns} columns of {out.dtype}")
        return out


@dataclass(frozen=True)
class Quantised:
    """A weight [rows, columns] as levels of 8 or 4 bits, see quantised.h; for tensors that passed the layout's `check`.

    `values` are int8 levels, or uint8 bytes of two places in `levels`. They follow the bits of a mask, or are [rows,
    words·64].
    """

    values: Tensor
    scales: Tensor  # [rows, groups], the bits of float16 as int16
    sums: Tensor  # `row_sums`
    columns: int
    dtype: torch.dtype  # of inputs, outputs and expanded rows
    group: int  # columns that share a scale; 0: all of a row
    mask: Tensor | None = None  # [rows, words] in int64
    starts: Tensor | None = None  # with a mask: the byte at which each row begins
    levels: Tensor | None = None  # [1, 16] or [rows, 16] in int8; None if values are levels
    tried = (256, 64, 16, 8, 4, 2, 1)
    has_many: ClassVar[Literal[False]] = False

    @property
    def rows(self) -> int:
        return self.scales.shape[0]

    @property
    def path(self) -> str:
        return path(torch.int8)

    def linear(self, x: Tensor, kernel: str | None = None) -> Tensor:
        """As `Bitmask.linear`, for any number of tokens; x is rounded as quantised.c says."""
        kernels, kernel, tokens, x = library(), kernel or self.path, len(x), x.contiguous()
        y = x.new_empty(tokens, self.rows)
        if tokens == 0:
            return y
        rounded = scratch(kernels.gblm_quantised_bytes(self._words, tokens))
        tensors = *self._stored, *_at(self.sums, x, y, rounded)
        sizes = self.rows, self._words, self.columns, tokens, *self._layout, *_codes(x.dtype, kernel)
        if not kernels.gblm_quantised_linear(*tensors, *sizes, torch.get_num_threads()):
            raise ValueError(f"no kernel {kernel} for {self.columns} columns")
        return y

    def expand(self, first: int, out: Tensor, kernel: str | None = None) -> Tensor:
        """As `Bitmask.expand`."""
        kernel = kernel or self.path
        sizes = first, len(out), self._words, self.columns, *self._layout, *_codes(out.dtype, kernel)
        if not library().gblm_quantised_restore(*self._stored, out.data_ptr(), *sizes, torch.get_num_threads()):
            raise ValueError(f"no kernel {kernel} for {self.columns} columns")
        return out

    def row_sums(self) -> Tensor:
        """What `linear` corrects by, [rows] in float32: Σ scale · level, or Σ level if a row has one scale."""
        weight = self if self.group else replace(self, scales=torch.full_like(self.scales, _ONE))
        tile = torch.empty(max(1, _SUMMED // self.columns), self.columns)
        firsts = range(0, self.rows, len(tile))
        parts = [weight.expand(i, tile[: self.rows - i]).sum(1, dtype=torch.float64) for i in firsts]
        return torch.cat(parts).float() if parts else torch.empty(0)

    @property
    def _words(self) -> int:
        return -(-self.columns // WORD)

    @property
    def _stored(self) -> tuple[int | None, ...]:
        return _at(self.mask, self.values, self.starts, self.levels, self.scales)

    @property
    def _layout(self) -> tuple[int, int]:
        stride = 0 if self.levels is None or len(self.levels) == 1 else 16  # from a row's levels to the next row's
        return stride, self.group


Weight = Bitmask | Quantised


def _at(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


@cache
def _codes(dtype: torch.dtype, kernel: str | None) -> tuple[int, int]:
    return DTYPES[dtype], PATHS.index(kernel or path(dtype))


_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _openmp_of_torch() -> tuple[int | None, ...]:
    """The entry points `_OPENMP` of torch's runtime; all None, which means one thread, if it has none.

    A preloaded runtime (LD_PRELOAD, as servers do) replaces the one that torch brings.
    """
    candidates: list[str | None] = []
    maps = Path("/proc/self/maps")
    if sys.platform == "linux" and maps.exists():
        lines = os.fsdecode(maps.read_bytes()).split("\n")  # a path may hold spaces, and bytes that are not UTF-8
        loaded = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
        runtimes = [name for name in loaded if "libgomp" in name or "libiomp" in name]
        # None searches the whole process; torch's own runtime, in its package, comes next
        candidates = [None, *sorted(runtimes, key=lambda name: ("torch" not in name, name))]
    for name in candidates:
        runtime = ctypes.CDLL(name)
        if all(hasattr(runtime, name) for name in _OPENMP):
            return tuple(ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in _OPENMP)
    return (None,) * len(_OPENMP)
