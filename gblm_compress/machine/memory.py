"""Peak memory of a stretch of work: resident set of the process on a CPU, device memory on CUDA; and freed memory."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SAMPLE_EVERY_S = 0.02
SHARE_OF_FREE_MEMORY = 0.8  # unless the user says how much

is_own_process = False  # the command line sets this: malloc and the environment may be changed

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of `mallopt`, as in malloc.h
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


@dataclass
class PeakMemory:
    """The highest value seen, valid once the `with` has ended."""

    peak_bytes: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measure the peak while the `with` runs.

    On a CPU the resident set is sampled every 20 ms: the kernel's peak never falls. On CUDA torch counts.
    """
    result = PeakMemory()
    if device.startswith("cuda"):
        import torch

        # The counter of a numbered device does not initialise CUDA.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    import psutil

    process, done = psutil.Process(), threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            result.peak_bytes = max(result.peak_bytes, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        done.set()
        watcher.join()
        result.peak_bytes = max(result.peak_bytes, process.memory_info().rss)


def free_memory(device: str) -> int:
    """Bytes of a device, or of the host for a CPU, that may be used."""
    import psutil
    import torch

    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    return int(SHARE_OF_FREE_MEMORY * free)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor while the `with` runs, only with glibc and in a process of our own.

    glibc maps large tensors one by one, and the system clears every page: a third of a training's time on a CPU.
    """
    process = ctypes.CDLL(None) if is_own_process and sys.platform == "linux" else None
    if process is None or not hasattr(process, "mallopt"):
        yield
        return
    for parameter, value in _KEEP.items():
        process.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            process.mallopt(parameter, value)
        process.malloc_trim(0)
