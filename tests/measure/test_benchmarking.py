import json

import pytest

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.measure import benchmarking
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.measure.timings import NO_SPEED_UP, Speedup, Spread
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny
from gblm_compress.settings import BenchmarkSettings

SHORT = {"prompt": 8, "generate": 4, "repeats": 5, "warmup": 1}


def test_spread_is_the_percentiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.4, 4.6)


@pytest.mark.parametrize(
    ("baseline", "model", "verdict"),
    [
        (Spread(2.0, 1.9, 2.1), Spread(1.0, 0.9, 1.1), "2.00× faster"),
        (Spread(1.0, 0.9, 1.1), Spread(2.0, 1.9, 2.1), "2.00× slower"),
        (Spread(2.0, 1.0, 3.0), Spread(1.0, 0.5, 1.1), NO_SPEED_UP),
        (Spread(1.0, 0.9, 1.1), Spread(1.0, 0.95, 1.0), NO_SPEED_UP),
    ],
)
def test_overlapping_intervals_claim_nothing(baseline, model, verdict) -> None:
    assert Speedup.of(baseline, model).verdict == verdict


def test_the_ends_of_a_speed_up_are_those_of_the_intervals() -> None:
    speedup = Speedup.of(Spread(3.0, 2.0, 4.0), Spread(1.0, 0.5, 1.6))
    assert (speedup.ratio, speedup.low, speedup.high) == (3.0, 2.0 / 1.6, 8.0)


def test_dense_and_pruned_are_timed_in_one_run(tiny, progress, tmp_path) -> None:
    dense, other = tiny("llama"), ModelSource("other", tmp_path)
    twin = ModelSource("twin", dense.folder)
    build_tiny("llama", tmp_path, seed=1)
    result = benchmark([other, twin], [dense], BenchmarkSettings(batch=(1, 2), **SHORT), progress=progress)
    timed = [(s.name, b) for b in (1, 2) for s in (dense, other, twin)]
    assert [(m.model, m.batch) for m in result.measurements] == timed
    for m in result.measurements:
        assert (m.runtime, m.provider, m.dtype) == ("torch", "cpu", "float32")
        assert 0 < m.ttft_ms.p10 <= m.ttft_ms.median <= m.ttft_ms.p90
        assert m.tokens_per_second == pytest.approx(1000 * m.batch / m.tpot_ms.median)
        assert m.peak_memory_bytes > 50e6 and m.load_seconds > 0
        assert m.prefill_kernels == m.decode_kernels == {"dense": 15}  # 7 in each of two blocks, and the head
        assert (m.decode_speedup is None) == (m.model == dense.name)
    assert [m.same_tokens_as_baseline for m in result.measurements] == 2 * [None, False, True]
    assert {"cpu", "cores", "packages", "threads", "device", "busy_cores"} <= set(result.environment)


def test_all_faults_are_found_before_anything_is_loaded(tiny, progress, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.measure.benchmarking.started", None)
    settings = BenchmarkSettings(prompt=600, generate=4)
    with pytest.raises(UsageError) as found:
        benchmark([tiny("llama")], [tiny("qwen2")], settings, device="gpu9", progress=progress)
    text = str(found.value)
    assert text.startswith("4 faults") and "device 'gpu9' is not known" in text
    assert text.count("prompt plus generate is 604") == 2 and "is no baseline of" in text


def test_no_baseline_in_the_same_runtime(tiny, progress, tmp_path) -> None:
    (tmp_path / "model.onnx").touch()
    (tmp_path / "config.json").write_text('{"dtype": "float16", "model_type": "llama"}')
    with pytest.raises(
        UsageError, match=r"runs in onnxruntime in float16, but no baseline.*--format onnx --dtype float16"
    ):
        benchmark([ModelSource("x", tmp_path)], [tiny("llama")], BenchmarkSettings(), progress=progress)


def test_levels_are_timed_against_levels(tiny, progress, tmp_path) -> None:
    """What is rounded is held against what is rounded, and neither against the other's floats."""
    models = {}
    for name, weights in (("packed", "int8"), ("rounded", "int8"), ("float", None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.onnx").touch()
        (folder / "config.json").write_bytes((tiny("llama").folder / "config.json").read_bytes())
        checks = {"weights": weights} if weights else {}
        base = {"name": "tiny", "sha256": "0" * 64}
        manifest = {"kind": "export", "base_model": base, "checks": checks}
        (folder / "gblm_manifest.json").write_text(json.dumps(manifest))
        models[name] = ModelSource(name, folder)
    lane = benchmarking._Lane("onnxruntime", "int8")
    settings = BenchmarkSettings(runtimes=("onnxruntime",))
    assert list(benchmarking._lanes([models["packed"]], settings, "auto", "cpu")) == [lane]
    found = benchmarking._baseline_of(models["packed"], lane, [models["float"], models["rounded"]])
    assert found is models["rounded"]
    with pytest.raises(UsageError, match="in int8, but no baseline does; .*--format onnx --quantise int8"):
        benchmarking._baseline_of(models["packed"], lane, [models["float"]])


def test_weights_of_float16_are_timed_against_those_of_the_same_arithmetic(tiny, tmp_path) -> None:
    models = {}
    for name, arithmetic in (("kernels", "float32"), ("dense kernels", "float32"), ("plain", "float16")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.onnx").touch()
        config = json.loads((tiny("llama").folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        base = {"name": "tiny", "sha256": "0" * 64}
        checks = {"dtype": "float16", "arithmetic": arithmetic}
        content = {"kind": "export", "base_model": base, "checks": checks}
        (folder / "gblm_manifest.json").write_text(json.dumps(content))
        models[name] = ModelSource(name, folder)
    settings = BenchmarkSettings(runtimes=("onnxruntime",))
    (lane, other) = benchmarking._lanes([models["kernels"], models["plain"]], settings, "auto", "cpu")
    assert (lane.dtype, other.dtype) == ("float16/float32", "float16")
    found = benchmarking._baseline_of(models["kernels"], lane, [models["plain"], models["dense kernels"]])
    assert found is models["dense kernels"]
    with pytest.raises(UsageError, match="--dtype float16 --kernels`"):
        benchmarking._baseline_of(models["kernels"], lane, [models["plain"]])


def test_no_model_in_the_asked_runtime(tiny, progress) -> None:
    with pytest.raises(UsageError, match="an ONNX export in onnxruntime"):
        benchmark([tiny("llama")], [tiny("llama")], BenchmarkSettings(runtimes=("onnxruntime",)), progress=progress)


def test_a_model_that_does_not_load_is_an_error_of_its_kind(tiny, progress, tmp_path) -> None:
    (tmp_path / "config.json").write_bytes((tiny("llama").folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be loaded"):
        benchmark([tiny("llama")], [ModelSource("x", tmp_path)], BenchmarkSettings(), progress=progress)


def test_what_ran_is_said_once_for_all_batch_sizes_that_ran_it() -> None:
    from gblm_compress.cli.summaries import kernel_lines

    def of(batch, prefill, decode):
        return {"model": "m", "batch": batch, "prefill_kernels": {prefill: 2}, "decode_kernels": {decode: 2}}

    assert kernel_lines([of(1, "many", "few"), of(2, "many", "few"), of(16, "many", "many")]) == [
        "m: prefill on 2 × many; decode on 2 × few (batch 1, 2)",
        "m: prefill and decode on 2 × many (batch 16)",
    ]
