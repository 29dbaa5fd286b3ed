"""The CPU's last cache: how large it is, and how to fill it with something else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
TIMES = 2
"""So many caches are read to replace all that one holds, since none replaces what was used longest ago exactly."""


def last_cache_bytes(caches: Path = _CACHES) -> int:
    """The size of the largest cache that the first core has or shares; 0 where the system does not say (not Linux).

    Args:
        caches: a folder like `/sys/devices/system/cpu/cpu0/cache`.
    """
    said = [path.read_text().strip() for path in caches.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in said if size and size[-1] in _UNITS), default=0)


def replacing(size: int) -> Callable[[], None]:
    """A function that reads as much memory as replaces all that a cache of that many bytes holds.

    One thread reads: the threads of torch would keep the cores for a while after it.
    """
    memory = np.ones(max(1, TIMES * size // 8), np.int64)

    def replace() -> None:
        memory.sum()

    return replace
