"""The benchmark stage: latency and memory of models and their dense baseline, in one run.

Each model has its own process (`python -m gblm_compress.measure.benchmarking`), for its own peak memory and load time;
it reads and answers lines of JSON. In each round every model generates once, in alternating order, against drift.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gblm_compress import errors
from gblm_compress.errors import GblmError, NotEnoughMemoryError, UsageError, first_line, is_out_of_memory
from gblm_compress.formats import FOLDER_RUNTIMES
from gblm_compress.machine import busy_cores, cost, environment
from gblm_compress.machine.memory import peak_memory
from gblm_compress.measure.runtimes import Runtime, check_device, check_installed, load_runtime, runtimes_of
from gblm_compress.measure.timings import Measurement, Speedup, Spread
from gblm_compress.models import loading, manifest
from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import BenchmarkSettings, ComputeSettings
from gblm_compress.storage import records
from gblm_compress.tasks.task import Task
from gblm_compress.tasks.text import vocabulary_of

PROCESS_BYTES = 600_000_000  # of a model's process, besides the model
LOAD_SECONDS = 5.0  # of a process, until its libraries are there


@dataclass(frozen=True)
class BenchmarkResult(records.Result):
    measurements: tuple[Measurement, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]


class _Lane(NamedTuple):
    """Only models of one lane are compared. The dtype is of `manifest.weights_of`, or of the arithmetic of levels."""

    runtime: str
    dtype: str


@dataclass(frozen=True)
class Contest:
    """Models to time, each against a baseline in the same runtime and dtype."""

    models: list[ModelSource]
    baselines: list[ModelSource]
    settings: BenchmarkSettings
    compute: ComputeSettings = field(default_factory=ComputeSettings)  # its dtype is for dense torch folders

    @cached_property
    def device(self) -> str:
        """The CPU if the device is absent, which is one of the `faults`."""
        try:
            return loading.choose_device(self.compute.device)
        except GblmError:
            return "cpu"

    @cached_property
    def lanes(self) -> dict[_Lane, list[ModelSource]]:
        lanes: dict[_Lane, list[ModelSource]] = {}
        for model in self.models:
            stored = manifest.weights_of(model) if model.is_export else None
            own = stored or loading.choose_dtype(self.compute.dtype, model, self.device)
            if self.settings.float_baseline and own.startswith("int"):
                own = "float32"
            for runtime in runtimes_of(model):
                if runtime in self.settings.runtimes:
                    lanes.setdefault(_Lane(runtime, own), []).append(model)
        return lanes

    def baseline_of(self, model: ModelSource, lane: _Lane) -> ModelSource:
        """The first baseline of the model's lane, or a dense folder that can be exported to it."""
        dense = [baseline for baseline in self.baselines if not baseline.is_export]
        able = [baseline for baseline in self.baselines if lane.runtime in runtimes_of(baseline)]
        fit = [each for each in able if not each.is_export or manifest.weights_of(each) == lane.dtype]
        if chosen := (fit or dense)[:1]:
            manifest.check_baseline(model, chosen[0])
            return chosen[0]
        raise UsageError(
            f"{model.name!r} runs in {lane.runtime} in {lane.dtype}, but no baseline does; speed is only compared "
            "within one runtime and dtype: give the dense Hugging Face folder as --baseline"
        )

    def faults(self) -> list[GblmError]:
        """The faults that show before the work: device, lengths, runtimes, baselines."""
        runtimes, tokens = self.settings.runtimes, self.settings.prompt + self.settings.generate
        looks: list[Callable[[], object]] = [partial(loading.choose_device, self.compute.device)]
        for model in (*self.models, *self.baselines):
            looks.append(partial(loading.check_length, model, tokens, "prompt plus generate"))
        asked = [model for model in self.models if set(runtimes_of(model)) & set(runtimes)]
        looks += [partial(check_device, model, self.device) for model in asked]
        looks += [partial(check_installed, runtime) for runtime in {lane.runtime for lane in self.lanes}]
        looks += [partial(self.baseline_of, model, lane) for lane, own in self.lanes.items() for model in own]
        if self.lanes:
            return errors.collect(looks)
        none = UsageError(
            f"none of {', '.join(repr(model.name) for model in self.models)} runs in {' or '.join(runtimes)}: "
            "a Hugging Face folder runs in torch and vllm, an ONNX export in onnxruntime and genai (make one with "
            "`gblm-compress export MODEL -o OUT --format onnx`)"
        )
        return [*errors.collect(looks), none]

    def missing(self) -> dict[str, ModelSource]:
        """The ONNX exports that the baselines lack: {their weights: the dense folder}. `faults` come first."""
        chosen = {lane: self.baseline_of(own[0], lane) for lane, own in self.lanes.items()}
        return {lane.dtype: dense for lane, dense in chosen.items() if lane.runtime not in runtimes_of(dense)}


def benchmark(contest: Contest, progress: Progress) -> BenchmarkResult:
    """Time a contest in which no export is `missing`."""
    errors.raise_all(contest.faults())
    assert not contest.missing()
    settings, device = contest.settings, contest.device
    threads = settings.threads or torch.get_num_threads()
    both = {lane: [contest.baseline_of(own[0], lane), *own] for lane, own in contest.lanes.items()}
    busy = busy_cores()
    folders = [model for model in (*contest.models, *contest.baselines) if not model.is_export]
    if folders and not progress.quiet:
        progress.say(_estimate(both, loading.count_weights(folders[0]), settings, device))
    measurements: list[Measurement] = []
    for lane, contenders in both.items():
        measurements += _benchmark_lane(contest, lane, contenders, threads, progress)
    place = {**environment(), "threads": threads, "device": device, "busy_cores": busy}
    return BenchmarkResult(tuple(measurements), settings.model_dump(mode="json"), place)


def _estimate(lanes: dict[_Lane, list[ModelSource]], weights: float, settings: BenchmarkSettings, device: str) -> str:
    """Time and memory of a benchmark: prompts are bound by operations, decode steps by the bytes of the weights."""
    rounds = settings.warmup + settings.repeats
    rate, bandwidth = cost.operations_per_second(device, torch.float32), cost.bytes_per_second(device)
    seconds, held = 0.0, [0.0]
    for lane, models in lanes.items():
        sizes = [
            model.bytes_on_disk if model.is_export else weights * getattr(torch, lane.dtype).itemsize
            for model in models
        ]
        held.append(sum(PROCESS_BYTES + 2 * size for size in sizes))
        for batch, size in product(settings.batch, sizes):
            generated = settings.generate * (size / bandwidth + 2 * weights * batch / rate)
            seconds += rounds * (2 * weights * batch * settings.prompt / rate + generated)
        seconds += len(models) * LOAD_SECONDS
    return cost.sentence(seconds, max(held))


def _benchmark_lane(
    contest: Contest, lane: _Lane, contenders: list[ModelSource], threads: int, progress: Progress
) -> list[Measurement]:
    """Time the models of one lane, the baseline first."""
    settings = contest.settings
    with ExitStack() as stack:
        workers = [
            stack.enter_context(started(source, lane, contest.device, threads, settings))
            for source in progress.track(contenders, f"loading ({lane.runtime})", unit="models")
        ]
        rounds = settings.warmup + settings.repeats
        runs: dict[tuple[int, int], list[dict[str, Any]]] = {
            (batch, index): [] for batch in settings.batch for index in range(len(workers))
        }
        with progress.counter(f"timing ({lane.runtime})", "generations", rounds * len(runs)) as advance:
            for batch, number in product(settings.batch, range(rounds)):
                order = list(enumerate(workers))
                for index, (ask, _) in order if number % 2 == 0 else reversed(order):
                    run = ask({"batch": batch, "seed": number})
                    if number >= settings.warmup:
                        runs[batch, index].append(run)
                    advance()
        finals = [ask({"finish": True}) for ask, _ in workers]
    measurements = []
    for number, batch in enumerate(settings.batch):
        base_ttft, base_tpot = _times(runs[batch, 0], settings)
        for index, (source, (_, facts), final) in enumerate(zip(contenders, workers, finals, strict=True)):
            ttft, tpot = _times(runs[batch, index], settings)
            prefill_kernels, *decode_kernels = facts["kernels"][number]
            measurements.append(
                Measurement(
                    **lane._asdict(),
                    **facts["known"],
                    **final,
                    model=source.name,
                    batch=batch,
                    ttft_ms=ttft,
                    tpot_ms=tpot,
                    tokens_per_second=batch * 1000 / tpot.median if tpot else None,
                    samples_per_second=None if tpot else batch * 1000 / ttft.median,
                    bytes_on_disk=source.bytes_on_disk,
                    prefill_kernels=prefill_kernels,
                    decode_kernels=decode_kernels[0] if decode_kernels else None,
                    prefill_speedup=Speedup.of(base_ttft, ttft) if index else None,
                    decode_speedup=Speedup.of(base_tpot, tpot) if index and base_tpot and tpot else None,
                )
            )
    return measurements


def _times(runs: list[dict[str, Any]], settings: BenchmarkSettings) -> tuple[Spread, Spread | None]:
    """(TTFT, TPOT) in milliseconds; no TPOT if nothing was generated."""
    decoded = [1000 * run["decode_seconds"] / (settings.generate - 1) for run in runs if "decode_seconds" in run]
    return Spread.of([1000 * run["prefill_seconds"] for run in runs]), Spread.of(decoded) if decoded else None


@contextmanager
def started(
    source: ModelSource, lane: _Lane, device: str, threads: int, settings: BenchmarkSettings
) -> Iterator[tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]]:
    """A model in a process of its own: a function that asks it or raises its error, and its first answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(request), file=requests, flush=True)
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            hint = "; it was killed, most likely for lack of memory" if code == -9 else ""
            raise GblmError(f"the benchmark process of {source.name!r} ended with exit status {code}{hint}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer

    where = {"name": source.name, "folder": str(source.folder.absolute()), "device": device, "threads": threads}
    try:
        yield ask, ask(where | lane._asdict() | settings.model_dump(include={"batch", "prompt", "generate"}))
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Load the model of the first request, then answer the others until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's print must not be taken for an answer
    silence_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    try:
        for answer in _answers():
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:  # the parent raises it, so that one program prints
        print(json.dumps(failure(error)), file=answers, flush=True)


def _answers() -> Iterator[dict[str, Any]]:
    setup = json.loads(sys.stdin.readline())
    source = ModelSource(setup["name"], Path(setup["folder"]))
    task = loading.task_of(source)
    # Other runtimes do not report their GPU memory: the process's own memory counts instead.
    with peak_memory(setup["device"] if setup["runtime"] in FOLDER_RUNTIMES else "cpu") as memory:
        passes = (setup["prompt"], 1) if task.generates else (setup["prompt"],)
        where = setup["dtype"], setup["device"], setup["threads"]
        start = time.perf_counter()
        runtime = load_runtime(source, *where, runtime=setup["runtime"], profile=passes, generate=setup["generate"])
        loaded = time.perf_counter() - start
        kernels = [[runtime.kernels(batch * tokens) for tokens in passes] for batch in setup["batch"]]
        config = loading.config_of(source)
        if task.generates:
            timed = partial(generate, runtime, config, prompt=setup["prompt"], generate=setup["generate"])
        else:
            timed = partial(forward, runtime, task, config, prompt=setup["prompt"])
        known = {"provider": runtime.provider, "step_ms": runtime.step_ms, "load_seconds": loaded}
        yield {"known": known, "kernels": kernels}
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("finish"):
                break
            yield timed(**request)
    yield {"peak_memory_bytes": memory.peak_bytes}


def failure(error: Exception) -> dict[str, str]:
    """An error as an answer: its message, and its class in `errors`."""
    if isinstance(error, GblmError):
        return {"error": str(error), "kind": type(error).__name__}
    if is_out_of_memory(error):
        advice = "give a smaller --batch, a shorter --prompt, or fewer models at a time"
        return {"error": f"memory ran out ({first_line(error)}); {advice}", "kind": NotEnoughMemoryError.__name__}
    said = f"{type(error).__name__}: {first_line(error)}"
    return {"error": f"a model cannot be timed ({said})", "kind": GblmError.__name__}


def forward(runtime: Runtime, task: Task, config: Any, batch: int, prompt: int, seed: int) -> dict[str, Any]:
    sample = task.timed(config, batch, prompt, seed)
    start = time.perf_counter()
    runtime.predict(sample)
    return {"prefill_seconds": time.perf_counter() - start}


def generate(runtime: Runtime, config: Any, batch: int, prompt: int, generate: int, seed: int) -> dict[str, Any]:
    """Time one greedy generation from random tokens: prefill (TTFT), then decode of `generate - 1` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary_of(config), (batch, prompt), generator=generator)
    start = time.perf_counter()
    token, cache = runtime.next_token(ids, None)
    first = time.perf_counter()
    for _ in range(generate - 1):
        token, cache = runtime.next_token(token, cache)
    return {"prefill_seconds": first - start, "decode_seconds": time.perf_counter() - first}


if __name__ == "__main__":
    main()
