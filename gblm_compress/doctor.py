"""What this machine and its packages can do: versions, devices, execution providers, instruction sets.

`environment` is recorded with every benchmark; `diagnose` says what each finding enables.
"""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

import gblm_compress
from gblm_compress.sources import DEMO_INSTALL, DEMO_PACKAGE

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "optimum", "datasets", "safetensors", "triton")
_INSTRUCTION_SETS = {
    "avx2": "fp32 kernels of torch and ONNX Runtime at half the width of AVX-512",
    "avx512f": "full-width fp32 kernels",
    "avx512_bf16": "bf16 at twice the fp32 rate: --dtype bfloat16 pays off",
    "amx_bf16": "bf16 matrix units: --dtype bfloat16 pays off most",
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    subject: str
    found: str
    enables: str
    ok: bool = True


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain values."""
    return {
        "gblm_compress": gblm_compress.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in _cpu_flags()],
        "gpus": _gpus(),
        "packages": {name: found for name in (*PACKAGES, _onnxruntime_package()) if (found := _version(name))},
    }


def diagnose() -> list[Finding]:
    """Everything worth knowing before a run, good and bad."""
    import onnxruntime
    import torch

    from gblm_compress.errors import MissingDependencyError
    from gblm_compress.kernels import cpu

    findings = [
        Finding("python", platform.python_version(), "", sys.version_info >= (3, 11)),
        Finding("cpu", f"{cpu_name()}, {os.cpu_count()} cores", ""),
    ]
    for name in (*PACKAGES, _onnxruntime_package()):
        found = _version(name)
        optional = name == "triton"
        enables = "GPU kernels of sparse folders and of torch.compile" if optional else ""
        findings.append(Finding(name, found or "not installed", enables, found is not None or optional))
    flags = _cpu_flags()
    findings += [
        Finding(f"instruction set {name}", "yes" if name in flags else "no", enables)
        for name, enables in _INSTRUCTION_SETS.items()
    ]
    paths = cpu.paths(torch.float32)
    findings.append(
        Finding(
            "sparse CPU kernels",
            ", ".join(paths) if paths else "not built: no C compiler was at hand at install",
            f"bitmask folders run on the {paths[-1]} path" if paths else "bitmask folders run, unpacked and slow",
            bool(paths),
        )
    )
    try:
        operator = cpu.onnxruntime_library().name
    except MissingDependencyError as error:
        operator = str(error).partition(":")[2].partition(". ")[0].strip()
    findings.append(Finding("ONNX Runtime operator", operator, "`export --format onnx --kernels`"))
    gpus = _gpus()
    for gpu in gpus:
        capability = gpu["compute_capability"]
        sparse = "torch's 2:4 kernels" if float(capability) >= 8.0 else "none of torch's 2:4 kernels (8.0 is needed)"
        findings.append(Finding("gpu", f"{gpu['name']}, compute capability {capability}", sparse))
    if not gpus:
        findings.append(
            Finding(
                "gpu",
                f"none that torch {torch.__version__} can use",
                "without one, semi-structured folders are unpacked for every product",
            )
        )
    for provider in onnxruntime.get_available_providers():
        findings.append(Finding("onnxruntime provider", provider, "listed; a run says which one it really used"))
    demo = find_spec(DEMO_PACKAGE) is not None
    findings.append(
        Finding("demo model", "installed" if demo else f"missing; run: {DEMO_INSTALL}", "MODEL 'demo'", demo)
    )
    return findings


def cpu_name() -> str:
    """The CPU's own name for itself."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _gpus() -> list[dict[str, Any]]:
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


def _onnxruntime_package() -> str:
    return "onnxruntime-gpu" if _version("onnxruntime-gpu") else "onnxruntime"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
