"""Checks of packed tensors before a kernel reads them, and comparisons of weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.methods.zeros import is_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of stored weights
AT_ONCE = 1 << 20  # weights of a matrix that are worked on together, so that temporaries stay in the cache
MOVES_MUCH = {8: 0.03, 4: 0.25}  # {bits of a level: the largest share of a weight that rounding may move}


def check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """ModelError for another dtype or shape, gaps between the elements, or values that are not finite."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        given, *needed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        gaps = "" if tensor.is_contiguous() else ", not contiguous"
        raise ModelError(f"{name}: {given} {list(tensor.shape)}{gaps}; needs {' or '.join(needed)} {list(shape)}")
    if tensor.is_floating_point() and not is_finite(tensor):
        raise ModelError(f"{name}: holds NaN or infinite values; the file is damaged, or {tensor.dtype} is too narrow")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (so that -0.0 differs from +0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def share_moved(stored: Tensor, weight: Tensor) -> float:
    """The share of a weight that rounding moved: Σ |stored - weight| / Σ |weight|."""
    moved = by_rows(lambda s, w: (s.float() - w.float()).abs().sum(1, dtype=torch.float64), stored, weight).sum()
    total = by_rows(lambda w: w.float().abs().sum(1, dtype=torch.float64), weight).sum()
    return float(moved / total) if moved else 0.0


def by_rows(compute: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """`compute` of some rows of the matrices at a time, one below the other."""
    step = max(1, AT_ONCE // matrices[0].shape[1])
    return torch.cat([compute(*(each[at : at + step] for each in matrices)) for at in range(0, len(matrices[0]), step)])
