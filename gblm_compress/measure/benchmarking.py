"""The benchmark stage: latency and memory of models beside their dense baseline, in one run.

Every model lives in a worker process; in each round every model generates once, in alternating order, so
that a drift of the machine hits all alike. The first rounds are warm-up and dropped.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gblm_compress import errors
from gblm_compress.errors import GblmError, UsageError
from gblm_compress.machine import busy_cores, environment
from gblm_compress.measure.benchmark_worker import started
from gblm_compress.measure.runtimes import check_device, check_installed, runtimes_of
from gblm_compress.measure.timings import Measurement, Speedup, Spread
from gblm_compress.models import loading, manifest
from gblm_compress.models.baseline import check_baseline
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import BenchmarkSettings


@dataclass(frozen=True)
class BenchmarkResult:
    """The outcome of the stage."""

    measurements: tuple[Measurement, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def benchmark(
    models: list[ModelSource],
    baselines: list[ModelSource],
    settings: BenchmarkSettings,
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress,
) -> BenchmarkResult:
    """Time `models` against their baseline in the same runtime and dtype.

    Args:
        models: Hugging Face folders (torch) and ONNX exports (ONNX Runtime).
        baselines: the dense model: its Hugging Face folder, which is timed in every dtype that a torch model has, and
            an ONNX export for each dtype of the ONNX models.
        dtype: of the torch models that are stored dense; exports have their own.

    Raises:
        GblmError: as `check`.
    """
    errors.raise_all(check(models, baselines, settings, dtype=dtype, device=device))
    device = loading.choose_device(device)
    threads = settings.threads or torch.get_num_threads()
    lanes = _lanes(models, settings, dtype, device)
    busy = busy_cores()
    measurements = [
        measurement
        for lane, contenders in lanes.items()
        for measurement in _benchmark_lane(
            [_baseline_of(contenders[0], lane, baselines), *contenders], lane, settings, device, threads, progress
        )
    ]
    return BenchmarkResult(
        tuple(measurements),
        settings.model_dump(mode="json"),
        {**environment(), "threads": threads, "device": device, "busy_cores": busy},
    )


def check(
    models: list[ModelSource], baselines: list[ModelSource], settings: BenchmarkSettings, *, dtype: str, device: str
) -> list[GblmError]:
    """The faults of a benchmark that show before it: a device that is absent, models that are too short for prompt and
    generation, that run in none of `settings.runtimes`, or that have no baseline of their runtime, dtype, architecture
    and origin.
    """
    absent = errors.collect([partial(loading.choose_device, device)])
    found = absent + errors.collect(
        partial(loading.check_length, model, settings.prompt + settings.generate, "prompt plus generate")
        for model in (*models, *baselines)
    )
    place = "cpu" if absent else loading.choose_device(device)
    found += errors.collect(
        partial(check_device, model, place) for model in models if set(runtimes_of(model)) & set(settings.runtimes)
    )
    lanes = _lanes(models, settings, dtype, place)
    if not lanes:
        found.append(
            UsageError(
                f"none of {', '.join(repr(model.name) for model in models)} runs in {' or '.join(settings.runtimes)}: "
                "a Hugging Face folder runs in torch and vllm, an ONNX export in onnxruntime and genai (make one with "
                "`gblm-compress export MODEL -o OUT --format onnx`)"
            )
        )
    found += errors.collect(partial(check_installed, runtime) for runtime in {lane.runtime for lane in lanes})
    return found + errors.collect(
        partial(_baseline_of, model, lane, baselines) for lane, contenders in lanes.items() for model in contenders
    )


@dataclass(frozen=True)
class _Lane:
    """What dense and pruned must share to be compared.

    Attributes:
        dtype: of the weights, see `manifest.weights_of`.
    """

    runtime: str
    dtype: str


def _lanes(
    models: list[ModelSource], settings: BenchmarkSettings, dtype: str, device: str
) -> dict[_Lane, list[ModelSource]]:
    """The models that are timed, by what they are timed in; what torch loads dense is given a dtype."""
    lanes: dict[_Lane, list[ModelSource]] = {}
    for model in models:
        own = manifest.weights_of(model) if model.is_export else loading.choose_dtype(dtype, model, device)
        for runtime in runtimes_of(model):
            if runtime in settings.runtimes:
                lanes.setdefault(_Lane(runtime, own), []).append(model)
    return lanes


def _baseline_of(model: ModelSource, lane: _Lane, baselines: list[ModelSource]) -> ModelSource:
    """The first baseline that runs in the model's lane: an export has one dtype, a dense folder is loaded in any.

    Raises:
        UsageError: there is none, or it is another model.
    """
    for baseline in baselines:
        fits = not baseline.is_export or manifest.weights_of(baseline) == lane.dtype
        if lane.runtime in runtimes_of(baseline) and fits:
            check_baseline(model, baseline)
            return baseline
    dtype, _, arithmetic = lane.dtype.partition("/")
    stored = f"--quantise {dtype}" if dtype.startswith("int") else f"--dtype {dtype}"
    stored += " --kernels" if arithmetic else ""
    export = f"gblm-compress export DENSE -o DENSE-ONNX --format onnx {stored}"
    advice = (
        f"export the dense model with `{export}` and give --baseline DENSE-ONNX"
        if lane.runtime != "torch"
        else "give the dense Hugging Face folder as --baseline"
    )
    raise UsageError(
        f"{model.name!r} runs in {lane.runtime} in {lane.dtype}, but no baseline does; speed is only compared within "
        f"one runtime and dtype: {advice}"
    )


def _benchmark_lane(
    contenders: list[ModelSource],
    lane: _Lane,
    settings: BenchmarkSettings,
    device: str,
    threads: int,
    progress: Progress,
) -> list[Measurement]:
    """Time the models of one lane, the first of which is the baseline."""
    runtime = lane.runtime
    with ExitStack() as stack:
        workers = [
            stack.enter_context(started(source, runtime, lane.dtype, device, threads, settings))
            for source in progress.track(contenders, f"loading ({runtime})", unit="models")
        ]
        rounds = settings.warmup + settings.repeats
        runs: dict[tuple[int, int], list[dict[str, Any]]] = {
            (batch, index): [] for batch in settings.batch for index in range(len(workers))
        }
        with progress.counter(f"timing ({runtime})", "generations", rounds * len(runs)) as advance:
            for batch in settings.batch:
                for number in range(rounds):
                    order = list(enumerate(workers))
                    for index, worker in order if number % 2 == 0 else reversed(order):
                        what = {"batch": batch, "prompt": settings.prompt, "generate": settings.generate}
                        run = worker.ask(what | {"seed": number})
                        if number >= settings.warmup:
                            runs[batch, index].append(run)
                        advance()
        finals = [worker.ask({"finish": True}) for worker in workers]
    measurements = []
    for number, batch in enumerate(settings.batch):
        base = _times(runs[batch, 0], settings)
        for index, (source, worker, final) in enumerate(zip(contenders, workers, finals, strict=True)):
            ttft, tpot = _times(runs[batch, index], settings)
            prefill_kernels, *decode_kernels = worker.facts["kernels"][number]
            measurements.append(
                Measurement(
                    model=source.name,
                    runtime=runtime,
                    provider=worker.facts["provider"],
                    dtype=lane.dtype,
                    batch=batch,
                    ttft_ms=ttft,
                    tpot_ms=tpot,
                    tokens_per_second=batch * 1000 / tpot.median if tpot else None,
                    samples_per_second=None if tpot else batch * 1000 / ttft.median,
                    peak_memory_bytes=final["peak_memory_bytes"],
                    load_seconds=worker.facts["load_seconds"],
                    bytes_on_disk=source.bytes_on_disk,
                    prefill_kernels=prefill_kernels,
                    decode_kernels=decode_kernels[0] if decode_kernels else None,
                    step_ms=worker.facts["step_ms"],
                    prefill_speedup=Speedup.of(base[0], ttft) if index else None,
                    decode_speedup=Speedup.of(base[1], tpot) if index and base[1] and tpot else None,
                    same_tokens_as_baseline=(
                        all(a["tokens"] == b["tokens"] for a, b in zip(runs[batch, 0], runs[batch, index], strict=True))
                        if index and tpot
                        else None
                    ),
                )
            )
    return measurements


def _times(runs: list[dict[str, Any]], settings: BenchmarkSettings) -> tuple[Spread, Spread | None]:
    """(TTFT, TPOT) in milliseconds; no TPOT where nothing was generated."""
    decoded = [1000 * run["decode_seconds"] / (settings.generate - 1) for run in runs if "decode_seconds" in run]
    return Spread.of([1000 * run["prefill_seconds"] for run in runs]), Spread.of(decoded) if decoded else None
