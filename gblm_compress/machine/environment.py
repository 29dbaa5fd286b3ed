"""Versions and hardware of this machine, as recorded with every measurement."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gblm_compress

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "optimum", "datasets", "safetensors", "triton")
INSTRUCTION_SETS = {
    "avx2": "fp32 kernels of torch and ONNX Runtime at half the width of AVX-512",
    "avx512f": "full-width fp32 kernels",
    "avx512_bf16": "bf16 at twice the fp32 rate: --dtype bfloat16 pays off",
    "amx_bf16": "bf16 matrix units: --dtype bfloat16 pays off most",
}


QUIET = 0.2
"""Cores that may be busy with something else while a figure is measured: beyond, it says little."""
SPINS, FEW_SPINS = "GOMP_SPINCOUNT", "3000"
"""How often a thread of OpenMP asks whether it may go on before it sleeps; 300,000 times unless told otherwise."""


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain values."""
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
    """How many cores other programs and threads keep busy now, looked at for that long."""
    import psutil

    return (os.cpu_count() or 1) * psutil.cpu_percent(interval=seconds) / 100


def noisy(seen: dict[str, Any]) -> str | None:
    """What is wrong with figures that were measured beside other work; None where there was little.

    Args:
        seen: an environment, with the `busy_cores` before the measurement.
    """
    busy, cores = seen["busy_cores"], seen["cores"]
    if busy <= QUIET:
        return None
    return f"{busy:.1f} of {cores} cores were busy with other work: the figures say little"


def share_cores() -> None:
    """Let OpenMP's threads sleep soon where they wait for each other, if other programs keep a core busy.

    They spin for milliseconds otherwise, which is fastest on a quiet machine; beside others, a thread that spins takes
    the core from the one that it waits for. Torch must not be loaded yet. What the user has set stays.
    """
    chosen = {"OMP_WAIT_POLICY", SPINS} & os.environ.keys()
    if not chosen and "torch" not in sys.modules and busy_cores(0.2) > 0.5:
        os.environ[SPINS] = FEW_SPINS


def _memory() -> int | None:
    """All of it; None where psutil is not there, as on a GPU machine that only runs benchmarks/gpu.py."""
    if not find_spec("psutil"):
        return None
    import psutil

    return int(psutil.virtual_memory().total)


def cpu_name() -> str:
    """The CPU's own name for itself."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def gpus() -> list[dict[str, Any]]:
    import torch

    return [
        {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
        for index in range(torch.cuda.device_count())
        for properties in [torch.cuda.get_device_properties(index)]
    ]


def onnxruntime_package() -> str:
    return "onnxruntime-gpu" if version_of("onnxruntime-gpu") else "onnxruntime"


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
