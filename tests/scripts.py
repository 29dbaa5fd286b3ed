"""Python in a process of its own, the scripts of `benchmarks/` as modules, and the code on the pages of `docs/`."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)


def run(*command: Any, folder: Path = ROOT, code: int = 0, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder; it must end with that exit code."""
    variables = os.environ | environment
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=variables)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def python(*arguments: Any, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python with this package."""
    return run(sys.executable, *arguments, **{"PYTHONPATH": str(ROOT)} | more)


@contextmanager
def loaded(name: str, *arguments: Any) -> Iterator[ModuleType]:
    """A script, imported for a time; it finds its arguments and its neighbours as it does when run."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    assert spec and spec.loader
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def blocks(*languages: str, page: Path) -> list[str]:
    """The code of those languages on a page."""
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]
