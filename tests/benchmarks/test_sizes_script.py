"""The benchmark of sizes at toy size, and that its random models are what they are called."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gblm_compress.kernels import cpu
from gblm_compress.models import files
from tests.exporters.test_onnx import needs_operator
from tests.scripts import loaded


@pytest.fixture(scope="module")
def script():
    with loaded("sizes") as module, pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.PRESETS, "toy", module.Shape(64, 128, blocks=3, heads=2, kv_heads=1, vocabulary=1024))
        yield module


def weights(folder):
    return {name: tensor for path in files.weight_files(folder) for name, tensor in load_file(path).items()}


def test_half_of_every_row_is_zero_and_the_rest_is_the_dense_model(script, tmp_path) -> None:
    models = script.random_models(replace(script.PRESETS["toy"], tied=True), tmp_path)
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
    assert script.random_models(script.PRESETS["toy"], tmp_path) == models
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@needs_operator
def test_every_engine_and_path_is_timed_and_rows_are_added(script, tmp_path, monkeypatch) -> None:
    result, best = tmp_path / "result.json", cpu.paths(torch.float16)[-1]
    common = ["--shape", "toy", "--blocks", "2", "--folder", str(tmp_path / "exports"), "--threads", "1"]
    lengths = ["--prompts", "8", "16", "--generate", "2", "--rounds", "1", "--json", str(result)]
    monkeypatch.setattr(script, "bandwidth", lambda threads: 1e9)
    for dtype, more in (("float16", ["--paths", "portable", best]), ("int8", ["--engines", "onnxruntime", "genai"])):
        monkeypatch.setattr(sys, "argv", ["sizes.py", *common, *lengths, "--dtypes", dtype, *more])
        script.main()
    found = json.loads(result.read_text())["rows"]
    rows = {(row["engine"], row["weights"], row["path"]): row for row in found if row["engine"] != "llama.cpp"}
    kinds = {("onnxruntime", f"{kind} float16", path) for kind in ("dense", "packed") for path in ("portable", best)}
    eights = ("dense int8", "dense int8, own kernels", "packed int8")
    kinds |= {(engine, kind, "") for engine in ("onnxruntime", "genai") for kind in eights}
    assert rows.keys() == kinds and {row["model"] for row in rows.values()} == {"2 blocks of toy"}
    for (engine, kind, path), row in rows.items():
        dense = rows[engine, kind.replace("packed", "dense").removesuffix(", own kernels"), path]
        for name in ("token", "step_of_4", "prompt_of_8", "prompt_of_16"):
            assert row[f"{name}_over_dense"] == dense[f"ms_per_{name}"] / row[f"ms_per_{name}"]
        assert row["share_of_bandwidth"] == pytest.approx(row["MB_per_token"] / row["ms_per_token"])
    half, whole = (rows["onnxruntime", f"{kind} float16", best]["MB_per_token"] for kind in ("packed", "dense"))
    assert 0.5 < half / whole < 0.9
