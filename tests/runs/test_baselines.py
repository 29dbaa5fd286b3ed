"""Dense exports that a benchmark makes for itself: which ones, and once."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from gblm_compress.models import manifest
from gblm_compress.runs.baselines import settings_of
from tests.conftest import export

SHORT = ["--prompt", "8", "--generate", "4", "--repeats", "5", "--warmup", "0"]


@pytest.mark.parametrize(
    "settings", [{"dtype": "float16"}, {"dtype": "float16", "kernels": True}, {"quantise": "int8"}]
)
def test_a_dense_export_has_the_weights_and_the_arithmetic_of_the_other(tiny, pruned, tmp_path, settings) -> None:
    _, other = export(pruned(), tmp_path / "other", format="onnx", **settings)
    weights = manifest.weights_of(other)
    _, dense = export(tiny("llama"), tmp_path / "dense", **settings_of(weights).model_dump())
    assert manifest.weights_of(dense) == weights


def test_a_benchmark_exports_its_baseline_once(tiny, pruned, server, tmp_path) -> None:
    """Also where two want it at once."""
    export(pruned(), tmp_path / "onnx", format="onnx", quantise="int8")
    (tmp_path / "exports").mkdir()
    caches = [tmp_path / "one", tmp_path / "two"]  # each with a process's output, and the same exports
    for cache in caches:
        cache.mkdir()
        (cache / "exports").symlink_to(tmp_path / "exports")
    command = ["benchmark", "onnx", "--baseline", tiny("llama").name, *SHORT, "--json"]
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda cache: server.run(command, tmp_path, cache), caches))
    ended.append(server.run(command, tmp_path, caches[0]))
    for done in ended:
        assert done.code == 0, done.stderr
        assert [m["model"] for m in json.loads(done.stdout)["measurements"]] == ["dense-onnx-quantise-int8", "onnx"]
    assert sum("kept for later benchmarks in" in done.stderr for done in ended) == 1
    assert "from an earlier benchmark" in ended[2].stderr and len(list((tmp_path / "exports").iterdir())) == 1


def test_faults_are_found_before_the_export(tiny, pruned, server, tmp_path) -> None:
    (tmp_path / "cache").mkdir()
    export(pruned(), tmp_path / "onnx", format="onnx")
    done = server.run(["benchmark", "onnx", "--baseline", tiny("qwen2").name, *SHORT], tmp_path, tmp_path / "cache")
    assert done.code == 2 and "is not a baseline of 'onnx'" in done.stderr
    assert not (tmp_path / "cache" / "exports").exists()
