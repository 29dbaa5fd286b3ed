"""The process that times a model: whatever happens in it is an answer, and nothing reaches the terminal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gblm_compress import errors
from gblm_compress.errors import GblmError, ModelError, NotEnoughMemoryError
from gblm_compress.measure.benchmarking import failure, vocabulary
from gblm_compress.models.source import ModelSource


def test_what_fails_after_the_load_is_an_answer(tiny) -> None:
    setup = {
        "name": "model", "folder": str(tiny("llama").folder), "dtype": "float32", "device": "cpu", "threads": 1,
        "runtime": "torch", "batch": [1], "prompt": 4, "generate": 2,
    }  # fmt: skip
    requests = [setup, {"batch": -1, "prompt": 4, "generate": 2, "seed": 0}]
    done = subprocess.run(
        [sys.executable, "-m", "gblm_compress.measure.benchmarking"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
    )
    loaded, failed = map(json.loads, done.stdout.splitlines())
    assert loaded["dtype"] == "float32"
    assert failed["kind"] == "GblmError" and "RuntimeError: " in failed["error"]
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ModelError("two\nlines"), ModelError, "two\nlines"),
        (MemoryError(), NotEnoughMemoryError, "memory ran out (MemoryError); give a smaller --batch"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), NotEnoughMemoryError, "memory ran out"),
        (KeyError("x"), GblmError, "a model cannot be timed (KeyError: 'x')"),
    ],
)
def test_the_kind_of_a_failure(error, kind, message) -> None:
    answer = failure(error)
    assert getattr(errors, answer["kind"]) is kind and answer["error"].startswith(message)


def test_the_vocabulary_of_a_model_with_a_config_of_its_text_part(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "x", "text_config": {"vocab_size": 7}}')
    assert vocabulary(ModelSource("x", tmp_path)) == 7
    config.write_text('{"model_type": "x"}')
    with pytest.raises(ModelError, match="'y': config.json has no vocab_size"):
        vocabulary(ModelSource("y", tmp_path))
