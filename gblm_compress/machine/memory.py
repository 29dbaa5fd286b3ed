"""Peak memory of a stretch of work: resident set of the process on a CPU, allocated device memory on CUDA; and what the
C library does with memory that is freed."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

SAMPLE_EVERY_S = 0.02

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of `mallopt`, by the numbers that malloc.h gives them."""
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


@dataclass
class PeakMemory:
    """The highest value seen, in bytes; valid once the `with` has ended."""

    peak_bytes: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measure the peak while the `with` runs.

    On a CPU the resident set is sampled every 20 ms, since the kernel's own high-water mark covers the
    whole life of the process; on CUDA the allocator's counter is read.
    """
    result = PeakMemory()
    if device.startswith("cuda"):
        import torch

        # The counter of a device with a number does not wake CUDA.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    process = psutil.Process()
    done = threading.Event()

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


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor while the `with` runs, rather than give it back to the system.

    glibc maps large tensors from the system one by one, which then clears every page anew: a third of a training's
    time on a CPU. Another C library is left as it is.
    """
    process = ctypes.CDLL(None) if sys.platform == "linux" else None
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
