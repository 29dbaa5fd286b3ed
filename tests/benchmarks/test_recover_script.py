"""The benchmark of a training at toy size."""

import json

import pytest

from tests.scripts import loaded


def test_the_bytes_of_a_step_are_those_of_each_pass() -> None:
    forward = 2 * (100 + 100 + 100) + 2 * 3 * 10  # dense, student, its backward pass; and the head in all three
    gradients, written = 2 * 2 * 100, 2 * 100
    kept = 50 * 4 * 2 * (1 + 1 + 2)  # packed gradient, master, moments: written and read
    with loaded("recover") as script:
        assert script.moved_bytes(100, 50, 10, 2) == forward + gradients + written + kept


def test_it_times_a_training(program, prose, tmp_path, capsys) -> None:
    result = tmp_path / "result.json"
    program("prune", "tiny", "-o", "pruned", "--method", "magnitude", "--fit", "none", "--quiet")
    options = ["--data", prose, "--steps", "5", "--sequence-length", "32", "--json", result]
    with loaded("recover", tmp_path / "pruned", "tiny", *options) as script:
        script.main()
    found, said = json.loads(result.read_text()), capsys.readouterr().out
    parts, floors = found["parts"], found["floors"]
    step = parts.pop("step")
    assert step > 0 and sum(parts.values()) == pytest.approx(step) and all(each >= 0 for each in parts.values())
    assert found["tokens_per_second"] == pytest.approx(64 / step) and all(each > 0 for each in floors.values())
    assert all(line in said for line in ("dense model", "floor: products", "floor: bytes"))
