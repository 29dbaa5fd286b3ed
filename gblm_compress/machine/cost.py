"""Time and memory of a long command, in a line before its work: from its operations and short trials here."""

import math
from timeit import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LONG_SECONDS = 600.0  # a longer run is offered a smaller one
OFFERED_SECONDS = 300.0  # that the smaller one takes


def sentence(seconds: float, memory: float, smaller: str = "", takes: float = 0.0) -> str:
    """The line. `memory` comes on top of the program's own. With the options `smaller` it `takes` fewer seconds."""
    line = f"this takes {words(seconds)} and at most {with_program(memory) / 1e9:.1f} GB of memory on this machine"
    if smaller and seconds > LONG_SECONDS and takes < seconds / 2:
        line += f"; {smaller} take {words(takes)}"
    return line


def with_program(memory: float) -> int:
    """Bytes of memory, with those that this program holds now."""
    import psutil

    return int(memory) + int(psutil.Process().memory_info().rss)


def fewer(amount: int, seconds: float) -> int:
    """The round part of an amount of work that takes about `OFFERED_SECONDS`, if all of it takes `seconds`."""
    share = max(1.0, amount * OFFERED_SECONDS / seconds)
    digit = 10 ** int(math.log10(share))
    return int(share // digit * digit)


def words(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 1:
        return "less than a second"
    number = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min" if minutes > 1.5 else f"{seconds:.0f} s"
    return f"about {number}"


def operations_per_second(device: "torch.device | str", dtype: "torch.dtype") -> float:
    """Operations a second in a block: three quarters of a short product's, as of SmolLM2-135M on AVX-512."""
    import torch

    x, weight = (torch.ones(rows, 1024, dtype=dtype, device=device) for rows in (512, 1024))
    seconds = min(repeat(lambda: (x @ weight).sum().item(), number=1, repeat=20))  # a CPU needs some to reach its rate
    return 0.75 * 2 * 512 * 1024 * 1024 / seconds


def bytes_per_second(device: str) -> float:
    """Bytes that are read a second, from memory that no cache holds."""
    import torch

    weights = torch.ones(1 << 26, device=device)
    return weights.nbytes / min(repeat(lambda: weights.sum().item(), number=1, repeat=4))
