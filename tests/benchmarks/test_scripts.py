"""Scripts of `benchmarks/` at toy size; the longer ones have files of their own."""

import gzip
import json
from dataclasses import replace
from unittest.mock import Mock

import numpy
import pytest

from gblm_compress.errors import ModelError
from gblm_compress.tasks import image_classification
from tests.scripts import loaded


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [(ModelError("no such"), 3, "error: no such\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_what_is_wrong_with_the_input_is_one_line_and_a_code(raised, code, said, capsys) -> None:
    with loaded("ending") as ending, pytest.raises(SystemExit) as ended:
        ending.exit_after(Mock(side_effect=raised))
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


def test_calibration_judges_every_text_pattern_and_seed_once(tmp_path, monkeypatch) -> None:
    result = tmp_path / "result.json"
    options = ["--model", "tiny", "--calibration", "self", "--judges", "demo", "--seeds", "1", "--samples", "2"]
    with loaded("calibration", result, *options) as script:
        script.main()
        found = json.loads(result.read_text())
        keys = [(row["calibration"], row["pattern"], row["seed"], row["samples"]) for row in found["rows"]]
        assert keys == [("self", "unstructured", 0, 2), ("self", "2:4", 0, 2)]
        assert all(row["perplexity"].keys() == found["dense"].keys() == {"demo"} for row in found["rows"])
        monkeypatch.setattr(script.gblm_compress, "prune", None)
        script.main()  # nothing is left to do
    assert json.loads(result.read_text()) == found


def test_fashion_mnist_becomes_tables_of_images(tmp_path) -> None:
    """The headers of 16 and 8 bytes are left out."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=numpy.uint8)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([2, 0, 9])))
        pixels = 255 - pixels
    with loaded("fashion_mnist", tmp_path / "made", "--source", tmp_path) as script:
        script.main()
    for name in ("train", "test"):
        found, _ = image_classification.read(str(tmp_path / "made" / f"{name}.parquet"), "evaluation", None, 0)
        assert [one.label for one in found] == [2, 0, 9]
        assert (numpy.stack([one.read("L") for one in found]) == pixels).all()
        pixels = 255 - pixels


def test_the_bytes_of_a_step_of_recover_are_those_of_each_pass() -> None:
    forward = 2 * (100 + 100 + 100) + 2 * 3 * 10  # dense, student, its backward pass; and the head in all three
    gradients, written = 2 * 2 * 100, 2 * 100
    kept = 50 * 4 * 2 * (1 + 1 + 2)  # packed gradient, master, moments: written and read
    with loaded("recover") as script:
        assert script.moved_bytes(100, 50, 10, 2) == forward + gradients + written + kept


def test_recover_times_a_training(program, prose, tmp_path, capsys) -> None:
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


def test_a_large_model_is_pruned_by_its_first_blocks_beside_its_plan(program, tmp_path, monkeypatch) -> None:
    result, work = tmp_path / "result.json", tmp_path / "work"
    options = ["toy", "--work", work, "--samples", "2", "--sequence-length", "32", "--memory", "1MiB", "--cold"]
    with loaded("large", *options, "--json", result) as script:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        toy = script.Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=5, vocab_size=512)
        monkeypatch.setitem(script.MODELS, "toy", toy)
        monkeypatch.setattr(script, "told", lambda *words: json.loads(program(*words, "--json").stdout))
        script.main()
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["model"], row["blocks"], row["all_blocks"], row["fit"]) == ("toy", 2, 5, "fast")
    assert row["peak_bytes"] > row["checkpoint_bytes"] > 0 and row["planned_bytes"] > 0
    assert {"read_bytes", "written_bytes"} <= row.keys()
    a_block, whole = row["seconds_a_block"], row["hours_of_all"] * 3600
    assert whole == pytest.approx(row["seconds"] + 3 * a_block)
    assert not list(work.iterdir())


def test_a_large_model_is_exported(tmp_path, monkeypatch) -> None:
    result, work = tmp_path / "result.json", tmp_path / "work"
    with loaded("large", "toy", "--work", work, "--exports", "bitmask-int8", "--json", result) as script:
        toy = script.PRESETS["llama-3.2-1b"]
        toy = replace(toy, hidden=64, intermediate=128, blocks=2, heads=4, kv_heads=2, vocabulary=512).config()
        monkeypatch.setitem(script.MODELS, "toy", toy)
        script.main()
    (row,) = json.loads(result.read_text())["rows"]
    assert row["checks"]["nonzero_fraction"] == pytest.approx(0.5, abs=0.02)
    assert row["peak_bytes"] > row["bytes"] > 0 and not list(work.iterdir())
    assert min(row["load_seconds"], row["ms_per_token"], row["loaded_peak_bytes"]) > 0
