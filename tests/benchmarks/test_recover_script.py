"""The benchmark of a training at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import loaded

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recover.py"


def test_the_bytes_of_a_step_are_those_of_each_pass() -> None:
    forward = 2 * (100 + 100 + 100) + 2 * 3 * 10  # dense, student, its backward pass; and the head in all three
    gradients, written = 2 * 2 * 100, 2 * 100
    kept = 50 * 4 * 2 * (1 + 1 + 2)  # packed gradient, master, moments: written and read
    with loaded("recover") as script:
        assert script.moved_bytes(100, 50, 10, 2) == forward + gradients + written + kept


def test_it_times_a_training(program, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A fox goes where the fox goes, and then another one comes. " * 80)
    pruned, result = tmp_path / "pruned", tmp_path / "result.json"
    program("prune", "tiny", "-o", str(pruned), "--method", "magnitude", "--fit", "none", "--quiet")
    arguments = [str(pruned), "tiny", "--data", str(text), "--steps", "5", "--sequence-length", "32"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json", str(result)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    parts, floors = found["parts"], found["floors"]
    step = parts.pop("step")
    assert step > 0 and sum(parts.values()) == pytest.approx(step) and all(each >= 0 for each in parts.values())
    assert found["tokens_per_second"] == pytest.approx(64 / step) and all(each > 0 for each in floors.values())
    for line in ("dense model", "floor: products", "floor: bytes"):
        assert line in done.stdout
