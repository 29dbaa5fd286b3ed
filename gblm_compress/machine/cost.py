"""Time and memory of a long command, predicted from its operations and short trials on this machine."""

from timeit import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LONG_SECONDS = 600.0  # a longer run is offered a smaller one
TRIAL = 1 << 28  # bytes that the trial of the memory's speed reads, more than any cache holds


def sentence(seconds: float, memory: float, smaller: tuple[str, float] | None = None) -> str:
    """`memory` is added to the program's own. `smaller`: the options of a smaller run, and its seconds."""
    line = f"this takes {words(seconds)} and at most {with_program(memory) / 1e9:.1f} GB of memory on this machine"
    if smaller is None or seconds < LONG_SECONDS or smaller[1] > seconds / 2:
        return line
    return f"{line}; {smaller[0]} take {words(smaller[1])}"


def with_program(memory: float) -> int:
    """Bytes of memory, at least those of the trials, with those that this program holds now."""
    import psutil

    return max(int(memory), TRIAL) + int(psutil.Process().memory_info().rss)


def words(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 1:
        return "less than a second"
    number = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min" if minutes > 1.5 else f"{seconds:.0f} s"
    return f"about {number}"


def operations_per_second(device: "torch.device | str", dtype: "torch.dtype") -> float:
    """Operations a second in a block: three quarters of a short product's, as measured on SmolLM2-135M (AVX-512)."""
    import torch

    x, weight = (torch.ones(rows, 1024, dtype=dtype, device=device) for rows in (512, 1024))
    seconds = min(repeat(lambda: (x @ weight).sum().item(), number=1, repeat=20))  # a CPU warms up
    return 0.75 * 2 * 512 * 1024 * 1024 / seconds


def bytes_per_second(device: str) -> float:
    """Bytes read a second from memory, outside the caches."""
    import torch

    weights = torch.ones(TRIAL // 4, device=device)
    return weights.nbytes / min(repeat(lambda: weights.sum().item(), number=1, repeat=4))
