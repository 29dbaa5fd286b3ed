"""The features of this machine and its packages, and the use of each."""

import os
import platform
from typing import Any

from gblm_compress import machine


def finding(subject: str, found: str, enables: str, ok: bool = True) -> dict[str, Any]:
    return {"subject": subject, "found": found, "enables": enables, "ok": ok}


def diagnose() -> list[dict[str, Any]]:
    import onnxruntime
    import torch

    from gblm_compress.errors import MissingDependencyError
    from gblm_compress.kernels import cpu
    from gblm_compress.models.finding import DEMO_MB, demo_file

    paths, of_levels = cpu.paths(torch.float32), cpu.paths(torch.int8)
    kernels = ", ".join(paths) or "not built: no C compiler was at hand at install"
    runs = f"bitmask folders run on the {paths[-1]} path, those of 8 and 4 bits on {of_levels[-1]}" if paths else ""
    if paths and paths[-1] == "portable":
        runs = "slower than dense weights, as this CPU has neither AVX2 nor NEON: export without `--kernels`"
    try:
        operator = cpu.onnxruntime_library().name
    except MissingDependencyError as error:
        operator = str(error).partition(":")[2].partition(". ")[0].strip()
    flags, busy = machine.cpu_flags(), f"{machine.busy_cores():.1f}"
    found = [
        finding("python", platform.python_version(), ""),
        finding("cpu", f"{machine.cpu_name()}, {os.cpu_count()} cores", ""),
        finding("busy cores", busy, f"`benchmark` is unreliable above {machine.QUIET}"),
    ]
    for name in (*machine.PACKAGES, machine.onnxruntime_package()):
        version, is_triton = machine.version_of(name), name == "triton"
        enables = "GPU kernels of sparse folders and of torch.compile" if is_triton else ""
        found.append(finding(name, version or "not installed", enables, version is not None or is_triton))
    found.append(finding("CPU products", "bfloat16" if machine.has_bfloat16("cpu") else "float32", "dtype auto"))
    for name, enables in machine.INSTRUCTION_SETS.items():
        found.append(finding(f"instruction set {name}", "yes" if name in flags else "no", enables))
    found.append(finding("sparse CPU kernels", kernels, runs or "bitmask folders run, unpacked and slow", bool(paths)))
    found.append(finding("ONNX Runtime operator", operator, "`export --format onnx --kernels`"))
    for gpu in (gpus := machine.gpus()):
        sparse = "cuSPARSELt for 2:4" if float(gpu["compute_capability"]) >= 8.0 else "no cuSPARSELt: 8.0 is needed"
        found.append(finding("gpu", f"{gpu['name']}, compute capability {gpu['compute_capability']}", sparse))
    if not gpus:
        without = "without one, semi-structured folders are unpacked for every product"
        found.append(finding("gpu", f"none that torch {torch.__version__} can use", without))
    for name in onnxruntime.get_available_providers():
        found.append(finding("onnxruntime provider", name, "listed; a run says which one it really used"))
    demo = "here" if demo_file() else f"not here; its first use fetches {DEMO_MB} MB"
    return [*found, finding("demo model", demo, "MODEL 'demo'")]
