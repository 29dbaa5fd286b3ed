"""The benchmark of engines at toy size, and that its random models are what they are called."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gblm_compress.models import files
from tests.exporters.test_onnx import needs_operator
from tests.scripts import loaded

SIZES = {"hidden": 64, "intermediate": 128, "blocks": 2, "heads": 2, "kv_heads": 1, "vocabulary": 1024, "tied": True}


@pytest.fixture(scope="module")
def script():
    with loaded("engines") as module, pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.PRESETS, "toy", replace(module.PRESETS["1b"], **SIZES))
        yield module


def weights(folder):
    return {name: tensor for path in files.weight_files(folder) for name, tensor in load_file(path).items()}


def test_half_of_every_row_is_zero_and_the_rest_is_the_dense_model(script, tmp_path) -> None:
    models = script.random_models("toy", tmp_path)
    dense, pruned = (weights(models[name].folder) for name in ("dense", "pruned"))
    assert dense.keys() == pruned.keys()
    for name, weight in dense.items():
        if "_proj" not in name:
            assert torch.equal(weight, pruned[name])
            continue
        for old, new in zip(weight.tolist(), pruned[name].tolist(), strict=True):
            largest = sorted(range(len(old)), key=lambda j, old=old: (-abs(old[j]), j))[: len(old) // 2]
            assert new == [value if j in largest else 0.0 for j, value in enumerate(old)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert script.random_models("toy", tmp_path) == models
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@needs_operator
def test_every_engine_is_timed_and_profiled(script, tmp_path, monkeypatch) -> None:
    models = ["--random", "toy", "--folder", str(tmp_path / "exports"), "--dtypes", "float16", "--threads", "1"]
    lengths = ["--prompt", "8", "--generate", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["engines.py", *models, *lengths, "--json", str(tmp_path / "result.json")])
    script.main()
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["engine"], row["weights"]): row for row in result["rows"] if row["engine"] != "llama.cpp"}
    engines, kinds = ("onnxruntime", "genai"), ("dense float16", "packed float16")
    assert set(rows) == {(engine, kind) for engine in engines for kind in kinds}
    ratios = {"decode": "ms_per_token", "prefill": "prefill_ms", "parallel": "ms_per_step_of_4"}
    for engine in engines:
        dense, packed = (rows[engine, kind] for kind in kinds)
        assert all(packed[f"{name}_over_dense"] == dense[time] / packed[time] for name, time in ratios.items())
        assert packed["MB"] < dense["MB"]
    operators = {entry["weights"]: entry["ms"].keys() for entry in result["profiles"]}
    assert "BitmaskLinear" in operators["packed float16"] and "BitmaskLinear" not in operators["dense float16"]
