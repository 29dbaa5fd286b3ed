"""docs/first-model.md as a newcomer follows it, on the tiny model: its commands in order, then its Python."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

from tests.scripts import ROOT, blocks, python

PAGE = ROOT / "docs" / "first-model.md"
ADVISE, *COMMANDS = "".join(blocks("", page=PAGE)).splitlines()
LESS = {"--samples": "2", "--sequence-length": "64", "--max-windows": "2"}


def test_the_page_is_followed_from_a_model_to_text(program, tmp_path: Path) -> None:
    assert ADVISE == "gblm-compress advise MODEL"  # it times for minutes, and has tests of its own
    for line in COMMANDS:
        _, *words = shlex.split(line.replace("MODEL", "tiny"))
        done = program(*(LESS.get(before, word) for before, word in pairwise(["", *words])))
        assert done.code == 0, f"{line}\n{done.stderr}"
    snippets = blocks("python", page=PAGE)
    for library in ("onnxruntime_genai", "transformers"):
        (code,) = [code for code in snippets if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE)]
        text = python("-c", code, folder=tmp_path).stdout.strip()
        assert text.startswith("The sea at night") and len(text) > len("The sea at night")
