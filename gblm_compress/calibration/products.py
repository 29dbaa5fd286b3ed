"""Which dtype products are computed in, where that is left open: the one that this machine multiplies faster in."""

import timeit
from functools import partial
from typing import TypeVar

import torch

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import UsageError
from gblm_compress.machine import cpu_name, remembered
from gblm_compress.settings import PruneSettings, RecoverSettings

Fit = TypeVar("Fit", PruneSettings, RecoverSettings)


def with_fit_dtype(settings: Fit, device: str, group: Ranks) -> Fit:
    """The settings, with "auto" as dtype of fits replaced by what it means here."""
    if settings.fit_dtype != "auto":
        return settings
    return settings.model_copy(update={"fit_dtype": faster_dtype(device, group)})


def dtype_for_fits(dtype: str, settings: PruneSettings, *, asked: bool) -> str:
    """float32 where fits would compute in float16, in which their gradients are lost: a squared error as a share of all
    outputs has gradients of 1e-8 and less.

    Args:
        settings: with their `fit_dtype`.
        asked: whether the user chose the dtype.

    Raises:
        UsageError: he chose float16.
    """
    if dtype != "float16" or settings.fit_dtype == "bfloat16":
        return dtype
    if asked:
        raise UsageError(
            "fits in float16 lose gradients that are too small for it; give fit_dtype bfloat16, fit fast, or compute "
            "in float32 or bfloat16: dtype says so for a folder, and a model in memory is converted before"
        )
    return "float32"


def faster_dtype(device: str, group: Ranks) -> str:
    """bfloat16 or float32: what the devices of all ranks multiply faster; measured once on a CPU.

    GPUs that have bfloat16 at all multiply it faster. CPUs without instructions for it emulate it, at a fraction of the
    speed.
    """
    where = torch.device(device)
    if where.type == "cuda":
        faster = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    else:
        machine = f"{cpu_name()}, torch {torch.__version__}"
        what = f"dtype of products on {torch.get_num_threads()} threads"
        faster = remembered(machine, what, measured_dtype, lambda dtype: dtype in ("bfloat16", "float32"))
    return "bfloat16" if group.every(faster == "bfloat16", where) else "float32"


def measured_dtype() -> str:
    """Whether a product of ordinary size is faster in bfloat16 or in float32 here; the better of some runs each."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.mm, x, weight), number=1, repeat=5)[1:])
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"
