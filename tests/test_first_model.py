"""docs/first-model.md as a newcomer follows it, on the tiny model: its commands in order, then its Python."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.test_docs import BLOCK, ROOT

BLOCKS = BLOCK.findall((ROOT / "docs" / "first-model.md").read_text())
ADVISE, *COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
PYTHON = [block for language, block in BLOCKS if language == "python"]
LESS = {"--samples": "2", "--sequence-length": "64", "--max-windows": "2"}


def snippet(library: str) -> str:
    (code,) = [code for code in PYTHON if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE)]
    return code


def test_the_page_is_followed_from_a_model_to_text(program, tmp_path: Path) -> None:
    assert ADVISE == "gblm-compress advise MODEL"  # it times for minutes, and has tests of its own
    for line in COMMANDS:
        _, *words = shlex.split(line.replace("MODEL", "tiny"))
        done = program(*(LESS.get(before, word) for before, word in pairwise(["", *words])))
        assert done.code == 0, f"{line}\n{done.stderr}"
    for library in ("onnxruntime_genai", "transformers"):
        command, environment = [sys.executable, "-c", snippet(library)], os.environ | {"PYTHONPATH": str(ROOT)}
        text = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout.strip()
        assert text.startswith(b"The sea at night") and len(text) > len("The sea at night")
