"""A benchmark: what is compared with what, and the process that times a model, where everything is an answer."""

import json
import shutil
from dataclasses import replace

import pytest

from gblm_compress.errors import GblmError, UsageError
from gblm_compress.measure import benchmarking
from gblm_compress.measure.benchmarking import Contest, benchmark, failure
from gblm_compress.measure.timings import NO_SPEED_UP, Speedup, Spread
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import BenchmarkSettings, ComputeSettings
from tests.conftest import build_tiny, edit_json

SHORT = ["--prompt", "8", "--generate", "4", "--repeats", "5", "--warmup", "1", "--json", "--quiet"]


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
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.4, 4.6)
    speedup = Speedup.of(baseline, model)
    assert speedup.verdict == verdict and speedup.ratio == baseline.median / model.median
    assert (speedup.low, speedup.high) == (baseline.p10 / model.p90, baseline.p90 / model.p10)


def test_dense_and_pruned_are_timed_in_one_run(tiny, program, tmp_path) -> None:
    dense = tiny("llama").name
    build_tiny("llama", tmp_path / "other", seed=1)
    shutil.copytree(dense, tmp_path / "twin")
    done = program("benchmark", "other", "twin", "--baseline", dense, "--batch", "1,2", *SHORT)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    timed = [(name, batch) for batch in (1, 2) for name in (dense, "other", "twin")]
    assert [(m["model"], m["batch"]) for m in found["measurements"]] == timed
    for m in found["measurements"]:
        assert (m["runtime"], m["provider"], m["dtype"]) == ("torch", "cpu", "float32")
        assert 0 < m["ttft_ms"]["p10"] <= m["ttft_ms"]["median"] <= m["ttft_ms"]["p90"]
        assert m["tokens_per_second"] == pytest.approx(1000 * m["batch"] / m["tpot_ms"]["median"])
        assert m["peak_memory_bytes"] > 50e6 and m["load_seconds"] > 0
        assert m["prefill_kernels"] == m["decode_kernels"] == {"dense": 15}  # 7 in each of two blocks, and the head
        assert (m["decode_speedup"] is None) == (m["model"] == dense)
    assert {"cpu", "cores", "packages", "threads", "device", "busy_cores"} <= set(found["environment"])


def test_all_faults_are_found_before_anything_is_loaded(tiny, progress, monkeypatch) -> None:
    monkeypatch.setattr(benchmarking, "started", None)
    settings, compute = BenchmarkSettings(prompt=600, generate=4), ComputeSettings(device="gpu9")
    with pytest.raises(UsageError) as found:
        benchmark(Contest([tiny("llama")], [tiny("qwen2")], settings, compute), progress)
    text = str(found.value)
    assert text.startswith("4 faults") and "device 'gpu9' is not supported" in text
    assert text.count("prompt plus generate is 604") == 2 and "is not a baseline of" in text
    settings = BenchmarkSettings(runtimes=("onnxruntime",))
    with pytest.raises(UsageError, match="an ONNX export in onnxruntime"):
        benchmark(Contest([tiny("llama")], [tiny("llama")], settings), progress)


@pytest.mark.parametrize(
    ("checks", "lane"),
    [
        ([{"weights": "int8"}, {}], "int8"),
        ([{"arithmetic": "float32"}, {"arithmetic": "float16"}], "float16/float32"),
        ([{}, {"weights": "int4"}], "float16"),
    ],
    ids=["levels", "arithmetic", "dtype"],
)
def test_weights_are_timed_against_those_of_the_same_kind_and_arithmetic(tiny, tmp_path, checks, lane) -> None:
    models = []
    for number, found in enumerate((checks[0], *checks)):
        folder = shutil.copytree(tiny("llama").folder, tmp_path / str(number))
        (folder / "model.onnx").touch()
        edit_json(folder / "config.json", dtype="float16")
        manifest = {"kind": "export", "base_model": {"name": "tiny", "sha256": tiny("llama").fingerprint}}
        (folder / "gblm_manifest.json").write_text(json.dumps(manifest | {"checks": {"dtype": "float16", **found}}))
        models.append(ModelSource(str(number), folder))
    packed, same, other = models

    def contest(*baselines: ModelSource) -> Contest:
        settings = BenchmarkSettings(runtimes=("onnxruntime",))
        return Contest([packed], [*baselines], settings, ComputeSettings(device="cpu"))

    (own,) = contest().lanes
    assert own == benchmarking._Lane("onnxruntime", lane)
    assert contest(other, same).baseline_of(packed, own) is same
    with pytest.raises(UsageError, match=f"in {lane}, but no baseline does; .*give the dense Hugging Face folder"):
        contest(other).baseline_of(packed, own)
    dense = tiny("llama")
    assert contest(other, dense).missing() == {lane: dense} and contest(dense, same).missing() == {}
    settings = contest().settings.model_copy(update={"float_baseline": True})
    over_floats = replace(contest(dense, same), settings=settings).missing()
    assert over_floats == ({"float32": dense} if lane == "int8" else {})


def test_a_model_that_does_not_load_is_an_error_of_its_kind(tiny, program, tmp_path) -> None:
    shutil.copytree(tiny("llama").folder, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").write_bytes(b"junk")
    done = program("benchmark", "x", "--baseline", tiny("llama").name, *SHORT)
    assert done.code == 3 and "damaged safetensors file" in done.stderr


def test_what_fails_after_the_load_is_an_answer(tiny) -> None:
    lane = benchmarking._Lane("torch", "float32")
    with benchmarking.started(tiny("llama"), lane, "cpu", 1, BenchmarkSettings(prompt=8)) as (ask, facts):
        assert facts["known"]["provider"] == "cpu"
        with pytest.raises(GblmError, match="cannot be timed .RuntimeError: "):
            ask({"batch": -1, "seed": 0})
        with pytest.raises(GblmError, match="process of .*llama' ended with exit status 0"):
            ask({"batch": 1, "seed": 0})


def test_a_lack_of_memory_is_an_error_of_its_kind() -> None:
    answer = failure(MemoryError())
    assert answer["kind"] == "NotEnoughMemoryError" and "give a smaller --batch" in answer["error"]
