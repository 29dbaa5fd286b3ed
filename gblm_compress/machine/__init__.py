"""This machine: its versions and hardware, recorded with every measurement, and measurements of its kernels."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import gblm_compress
from gblm_compress.errors import OutputError, UsageError
from gblm_compress.storage import outputs, records

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "optimum", "datasets", "safetensors", "triton")
INSTRUCTION_SETS = {
    "avx2": "fp32 kernels of torch and ONNX Runtime at half the width of AVX-512",
    "avx512f": "full-width fp32 kernels",
    "avx512_bf16": "bf16 at twice the fp32 rate: --dtype bfloat16 pays off",
    "amx_bf16": "bf16 matrix units: --dtype bfloat16 pays off most",
}
QUIET = 0.2  # cores that may be busy with other work during a measurement
SPINS, FEW_SPINS = "GOMP_SPINCOUNT", "3000"  # of a thread of OpenMP before it sleeps; 300,000 by default
MEASUREMENTS = "measurements.json"  # in the cache folder: {machine: {what: result}}

CACHE_VARIABLE = "GBLM_COMPRESS_CACHE"
KEPT_DAYS = 30  # since its last use, for a text or an export in the cache
LONGEST_MAKING_S = 3600.0  # wait while another process makes the same folder of the cache

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
T = TypeVar("T", int, str)


def cache_folder() -> Path:
    """$GBLM_COMPRESS_CACHE, or gblm-compress in the user's cache folder."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gblm-compress"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache. If it is missing, one process makes it and others wait."""
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with outputs.lock_beside(folder, LONGEST_MAKING_S):
                outputs.remove_partial(folder)
                if not folder.is_dir():
                    with outputs.atomic_folder(folder) as temporary:
                        make(temporary)
        except OSError as error:
            raise UsageError(
                f"the cache folder {str(folder.parent)!r} cannot be written: {error.strerror}; set {CACHE_VARIABLE}"
            ) from error
    return folder


def keep(path: Path) -> None:
    """Mark a file or folder of the cache as used, and remove those beside it that are unused for `KEPT_DAYS`."""
    for old in path.parent.iterdir():
        with suppress(OSError):  # another process removed it, or another user owns it
            if old == path:
                os.utime(path)
            elif old.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def environment() -> dict[str, Any]:
    return {
        "gblm_compress": gblm_compress.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in cpu_flags()],
        "gpus": gpus(),
        "packages": {name: found for name in (*PACKAGES, onnxruntime_package()) if (found := version_of(name))},
    }


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores other programs and threads keep busy, on average over the next seconds."""
    import psutil

    return (os.cpu_count() or 1) * psutil.cpu_percent(interval=seconds) / 100


def noisy(seen: dict[str, Any]) -> str | None:
    """A warning about figures measured beside other work, if any; `seen` is an environment with `busy_cores`."""
    busy, cores = seen["busy_cores"], seen["cores"]
    return f"{busy:.1f} of {cores} cores were busy with other work: do not trust the figures" if busy > QUIET else None


def share_cores() -> None:
    """Let waiting threads of OpenMP sleep soon if other programs keep a core busy; call this before torch is loaded.

    Beside other programs, a thread that spins takes the core from the one that it waits for. Users' settings stay.
    """
    chosen = {"OMP_WAIT_POLICY", SPINS} & os.environ.keys()
    if not chosen and "torch" not in sys.modules and busy_cores(0.2) > 0.5:
        os.environ[SPINS] = FEW_SPINS


def _memory() -> int | None:
    """None without psutil, as on a GPU machine that only runs benchmarks/gpu.py."""
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().total)
    return None


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())  # on x86, on ARM


def has_bfloat16(device: str) -> bool:
    """Whether the CPU or GPU has instructions for bfloat16; False if the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def gpus() -> list[dict[str, Any]]:
    import torch

    return [
        {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def onnxruntime_package() -> str:
    return "onnxruntime-gpu" if version_of("onnxruntime-gpu") else "onnxruntime"


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def last_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The size of the largest cache that the first core has or shares; 0 if unknown (not on Linux)."""
    said = [path.read_text().strip() for path in caches.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in said if size and size[-1] in _UNITS), default=0)


def replacing(size: int) -> Callable[[], object]:
    """A function that evicts a cache of `size` bytes, in one thread: torch's threads would stay busy."""
    import numpy as np

    return np.ones(max(1, 2 * size // 8), np.int64).sum


def remembered(machine: str, what: str, measure: Callable[[], T], is_valid: Callable[[Any], bool]) -> T:
    """The result of `measure`, or a valid earlier one for the same `machine` (hardware, versions) and inputs `what`."""
    path = cache_folder() / MEASUREMENTS
    known = recorded(path, machine)
    if what not in known or not is_valid(known[what]):
        known[what] = measure()
        with suppress(OSError, OutputError):  # without a writable cache, only the next start is slower
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = _read(path)  # again: another process may have added to it
            stored[machine] = stored.get(machine, {}) | known
            records.write_file(path, json.dumps(stored, indent=2) + "\n")
    result: T = known[what]
    return result


@cache
def recorded(path: Path, machine: str) -> dict[str, Any]:
    return _read(path).get(machine, {})


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = records.read_json(path)
    except (OSError, ValueError):
        return {}
    return {machine: results for machine, results in content.items() if isinstance(results, dict)}
