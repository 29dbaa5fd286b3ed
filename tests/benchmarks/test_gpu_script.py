"""The GPU benchmark at toy size on the CPU: that every section runs, and that what it says is what it measured."""

import json
from importlib.util import find_spec
from itertools import product

import pytest

from tests.scripts import loaded, python

SCRIPT = "benchmarks/gpu.py"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

# As on a machine where the package is not installed: none but torch, triton, transformers and what those bring.
RUN = """
import runpy, sys
for name in ("optimum", "datasets", "gguf", "typer"):
    sys.modules[name] = None
import tests.triton_interpreter
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT = """
import importlib.util, sys
sys.modules["pydantic"] = sys.modules["psutil"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("pydantic", "psutil") else found(name)
import gblm_compress.kernels.gpu, gblm_compress.layouts.cuda_linear, gblm_compress.models.packed_checkpoint
import gblm_compress.measure.doctor
from gblm_compress.machine import environment
from gblm_compress.progress import Progress
assert environment()["memory_bytes"] is None
Progress(quiet=True).say("")
"""


@pytest.fixture(scope="module")
def script():
    with loaded("gpu") as module:
        yield module


def test_every_section_runs(tmp_path) -> None:
    python("-c", RUN, SCRIPT, "--dry-run", "--json", tmp_path / "result.json", TRITON_INTERPRET="1", COLUMNS="200")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["dry_run"] is True
    kernels, one_token, levels, model, pruning, onnx = result["sections"].values()
    assert kernels["left_out"] == one_token["left_out"] == levels["left_out"] == model["left_out"] == []
    names = ("dense", "Triton sparse24", "Triton bitmask", "unpack sparse24, dense", "unpack bitmask, dense")
    assert {(row["execution"], row["tokens"]) for row in kernels["rows"]} == set(product(names, (1, 8)))
    assert all(row["ms"] > 0 and row["over_dense"] > 0 for row in kernels["rows"])
    assert any("cusparselt" in name for name in kernels["excluded"])  # with torch's reason: there is no CUDA
    dense = ("cuBLAS, linear", "cuBLAS, matrix times vector")
    assert [row["execution"] for row in levels["rows"]] == [*dense, "Triton bitmask-int8", "Triton bitmask-int4"]
    # 2 KiB of scales, starts and padding weigh in at toy size
    assert all(row["byte_limit"] > 1 for row in levels["rows"] if "Triton" in row["execution"])
    for dtype in ("float16", "bfloat16"):
        rows = {row["execution"]: row for row in one_token["rows"] if row["dtype"] == dtype}
        assert set(rows) == {*dense, "Triton bitmask", "Triton sparse24"}
        cublas = min(rows[name]["ms"] for name in dense)
        assert all(row["over_cublas"] == cublas / row["ms"] for row in rows.values())
    assert "aten::mv" in one_token["profiler"]["cuBLAS, matrix times vector, float16"]
    ways = product(("dense", "sparse24", "bitmask"), ("decode", "prefill"), ("eager", "compiled"))
    assert {(row["execution"], row["phase"], row["mode"]) for row in model["rows"]} == set(ways)
    assert len(model["failed"]) == 12 and all("CUDA graphs need CUDA" in why for why in model["failed"].values())
    assert all(entry["same_greedy_tokens"] == 1.0 for entry in model["agreement"].values())
    assert "gblm_compress::linear" in model["profiler"]["sparse24 decode"]
    assert "gblm_compress::linear" not in model["profiler"]["dense decode"]
    assert onnx["rows"] and "CUDA" in str(onnx["skipped"])
    assert [row["method"] for row in pruning["rows"]] == ["wanda", "gblm"]
    for row in pruning["rows"]:
        line = row["seconds_1_blocks"] + 4 * (row["seconds_2_blocks"] - row["seconds_1_blocks"])
        assert row["seconds_5_blocks_extrapolated"] == pytest.approx(line)
        assert row["from"] <= line <= row["to"]


def test_of_this_package_only_what_needs_no_other_is_imported(script, monkeypatch) -> None:
    """On a machine without pydantic and psutil, the parts that do not prune still run."""
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    skipped = script.pruning(None, None, [])["skipped"]
    assert "pruning needs packages that are not installed: pydantic, psutil" in skipped
    python("-c", WITHOUT)


def test_without_a_gpu_it_says_so() -> None:
    assert "no CUDA device here; --dry-run" in python(SCRIPT, code=1, CUDA_VISIBLE_DEVICES="").stderr


def test_break_even(script) -> None:
    measured = {
        "Triton bitmask": {1: 1.5, 4: 0.9, 2: 0.8, 8: 1.2}, "Triton sparse24": {1: 0.5, 2: 1.1},
        "cusparselt": {8: 1.1, 64: 0.9, 256: 1.2, 512: 1.3}, "dense": {512: 1.0},
    }  # fmt: skip
    rows = [
        {"layer": "l", "tokens": tokens, "execution": execution, "over_dense": ratio}
        for execution, ratios in measured.items() for tokens, ratio in ratios.items()
    ]  # fmt: skip
    assert script.break_even(rows) == {"l": {"triton_wins_up_to_tokens": 2, "cusparselt_wins_from_tokens": 256}}
