"""The CPU kernels of the bitmask layout: the compiled library, its paths, and the threads it borrows.

The library is plain C, built with the package; where no compiler was at hand it is missing, and `available()` says so.
`GBLM_COMPRESS_KERNEL` forces a path (portable, neon, avx2, vnni, avx512, amx).
"""

import ctypes
import os
import sys
import threading
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from gblm_compress.errors import MissingDependencyError, UsageError
from gblm_compress.kernels.masks import WORD

PATHS = ("portable", "neon", "avx2", "vnni", "avx512", "amx")
PATH_VARIABLE = "GBLM_COMPRESS_KERNEL"
FEW_TOKENS = 8
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The library's numbers for what is not quantised."""
_LIBRARY = "_bitmask"


def library_file() -> Path | None:
    folder = Path(__file__).parent
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / (_LIBRARY + suffix)).exists()), None)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, joined to torch's threads; None where the package was installed without a compiler."""
    found = library_file()
    if found is None:
        return None
    kernels = ctypes.CDLL(str(found))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernels.gblm_bitmask_linear.argtypes = [pointer] * 6 + [size] * 3 + [ctypes.c_int] * 3
    kernels.gblm_bitmask_expand.argtypes = [pointer] * 4 + [size] * 4 + [ctypes.c_int] * 3
    kernels.gblm_panel_bytes.argtypes, kernels.gblm_panel_bytes.restype = [size, size, ctypes.c_int], size
    kernels.gblm_quantised_bytes.argtypes, kernels.gblm_quantised_bytes.restype = [size, size], size
    kernels.gblm_quantised_linear.argtypes = [pointer] * 10 + [size] * 5 + [ctypes.c_int] * 4
    kernels.gblm_quantised_restore.argtypes = [pointer] * 7 + [size] * 5 + [ctypes.c_int] * 4
    kernels.gblm_set_parallel.argtypes = [pointer] * len(_OPENMP)
    kernels.gblm_set_parallel(*_openmp_of_torch())
    return kernels


def available() -> bool:
    """Whether the compiled kernels are there."""
    return library() is not None


def onnxruntime_library() -> Path:
    """The library with the operator `gblm.BitmaskLinear`, for `SessionOptions.register_custom_ops_library`.

    Raises:
        MissingDependencyError: it was compiled without ONNX Runtime's C header, or not at all.
    """
    found = library_file()
    if found is None or not hasattr(ctypes.CDLL(str(found)), "RegisterCustomOps"):
        raise MissingDependencyError(
            "the operator for ONNX Runtime was not compiled: "
            + ("no C compiler was at hand" if found is None else "ONNX Runtime's C header was not found")
            + " when gblm-compress was installed. Install a compiler and the header (Debian, Ubuntu: `apt install gcc "
            "libonnxruntime-dev`; elsewhere put the folder of onnxruntime_c_api.h into CPATH), then reinstall with "
            "`pip install --force-reinstall --no-deps --no-cache-dir`"
        )
    return found


@cache
def paths(dtype: torch.dtype) -> tuple[str, ...]:
    """The paths that this CPU can run for weights of `dtype`, int8 for all that are quantised, slowest first; empty
    without the library.
    """
    kernels = library()
    if kernels is None:
        return ()
    supported = kernels.gblm_quantised_paths() if dtype is torch.int8 else kernels.gblm_paths(DTYPES[dtype])
    return tuple(name for index, name in enumerate(PATHS) if supported >> index & 1)


@cache
def path(dtype: torch.dtype) -> str:
    """The path that runs: the best one, or the one that `GBLM_COMPRESS_KERNEL` forces.

    Raises:
        UsageError: a path is forced that this CPU or dtype does not have.
    """
    forced = os.environ.get(PATH_VARIABLE)
    if forced is None:
        return paths(dtype)[-1]
    if forced not in paths(dtype):
        raise UsageError(
            f"{PATH_VARIABLE}={forced}: this CPU has no such path for {dtype}; it has {', '.join(paths(dtype))}"
        )
    return forced


@cache
def has_many(dtype: torch.dtype, kernel: str) -> bool:
    """Whether the path has a kernel for more than `FEW_TOKENS` tokens of that dtype."""
    kernels = library()
    return kernels is not None and bool(kernels.gblm_has_many(DTYPES[dtype], PATHS.index(kernel)))


def linear(
    x: Tensor, mask: Tensor, values: Tensor, starts: Tensor, kernel: str | None = None, *, many: bool = False
) -> Tensor:
    """x Wᵀ on a sparse kernel, accumulated in float32.

    Args:
        x: [tokens, columns] in the dtype of `values`.
        mask, values, starts: the packed weight [rows, columns], passed by `bitmask.check`; it is not checked again.
        kernel: one of `paths`; the best one if unset.
        many: the kernel for many tokens, where `has_many`; otherwise the one for 1 to 8.

    Returns:
        [tokens, rows] in the dtype of `x`.

    Raises:
        ValueError: x is no such tensor, or there is no such kernel for so many tokens.
    """
    kernels = library()
    assert kernels is not None
    tokens, columns = x.shape
    rows, words = mask.shape
    if not x.is_cpu or x.dtype != values.dtype or -(-columns // WORD) != words:
        raise ValueError(
            f"x is {x.dtype} on {x.device} with {columns} columns; the weight is {values.dtype} on the CPU with "
            f"{words} words of {WORD} columns"
        )
    if columns != words * WORD:
        x = torch.nn.functional.pad(x, (0, words * WORD - columns))
    x = x.contiguous()
    y = x.new_empty(tokens, rows)
    if tokens == 0:
        return y
    kind, chosen = _codes(x.dtype, kernel)
    panels = scratch(kernels.gblm_panel_bytes(words, tokens, kind)).data_ptr() if many else None
    done = kernels.gblm_bitmask_linear(
        mask.data_ptr(),
        values.data_ptr(),
        starts.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        panels,
        rows,
        words,
        tokens,
        kind,
        chosen,
        torch.get_num_threads(),
    )
    if not done:
        raise ValueError(f"no kernel {kernel or path(x.dtype)} for {tokens} tokens of {x.dtype} (many={many})")
    return y


@cache
def _codes(dtype: torch.dtype, kernel: str | None) -> tuple[int, int]:
    """The library's numbers for a dtype and a path."""
    return DTYPES[dtype], PATHS.index(kernel or path(dtype))


_buffers = threading.local()


def scratch(size: int) -> Tensor:
    """That many bytes of memory, kept for this thread's next call: fresh pages would cost more than what is written."""
    held: Tensor | None = getattr(_buffers, "bytes", None)
    if held is None or held.numel() < size:
        held = _buffers.bytes = torch.empty(size, dtype=torch.uint8)
    return held[:size]


def expand(
    mask: Tensor, values: Tensor, starts: Tensor, columns: int, first: int, out: Tensor, kernel: str | None = None
) -> Tensor:
    """Rows `first` … `first + len(out)` of the packed weight, dense, written into `out` [count, columns].

    Raises:
        ValueError: the weight has no such rows, or `out` is no such tensor; as for `linear`.
    """
    kernels = library()
    assert kernels is not None
    rows = mask.shape[0]
    if (
        not 0 <= first <= first + len(out) <= rows
        or not (out.is_cpu and out.is_contiguous())
        or (out.dtype, out.shape[1:]) != (values.dtype, (columns,))
    ):
        raise ValueError(f"rows {first} to {first + len(out)} of {rows} into {out.dtype} {list(out.shape)}")
    done = kernels.gblm_bitmask_expand(
        mask.data_ptr(),
        values.data_ptr(),
        starts.data_ptr(),
        out.data_ptr(),
        first,
        out.shape[0],
        columns,
        mask.shape[1],
        *_codes(values.dtype, kernel),
        torch.get_num_threads(),
    )
    if not done:
        raise ValueError(f"no kernel {kernel or path(values.dtype)} for {columns} columns of {values.dtype}")
    return out


_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _openmp_of_torch() -> tuple[int | None, ...]:
    """The entry points `_OPENMP` of the runtime that torch runs on; Nones where it has none: one thread then.

    One that was loaded before all else (LD_PRELOAD, as servers do) takes the place of the one that torch brings.
    """
    candidates: list[str | None] = []
    maps = Path("/proc/self/maps")
    if sys.platform == "linux" and maps.exists():
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
        runtimes = [name for name in loaded if "libgomp" in name or "libiomp" in name]
        # None is what all of the process sees; then torch's own comes first: a path inside its package
        candidates = [None, *sorted(runtimes, key=lambda name: ("torch" not in name, name))]
    for name in candidates:
        runtime = ctypes.CDLL(name)
        if all(hasattr(runtime, name) for name in _OPENMP):
            return tuple(ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in _OPENMP)
    return (None,) * len(_OPENMP)
