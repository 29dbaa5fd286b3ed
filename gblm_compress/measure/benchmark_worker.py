"""One model in a process of its own, timed on request: `python -m gblm_compress.measure.benchmark_worker`.

A process per model keeps peak memory and load time apart; the parent (`benchmarking`) asks each by its `Worker`, in
turn, so that all models see the same machine. Requests and answers are lines of JSON on stdin and stdout.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from gblm_compress import errors
from gblm_compress.errors import GblmError, ModelError, NotEnoughMemoryError, first_line, is_out_of_memory
from gblm_compress.formats import FOLDER_RUNTIMES
from gblm_compress.machine.memory import peak_memory
from gblm_compress.measure.runtimes import Generating, Runtime, load_runtime
from gblm_compress.models import loading
from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import BenchmarkSettings
from gblm_compress.tasks.task import Task


class Worker:
    """A model in a process of its own; `facts` is its answer to the first request."""

    def __init__(self, process: "subprocess.Popen[str]", setup: dict[str, Any]) -> None:
        self._process = process
        self._name = setup["name"]
        self.facts = self.ask(setup)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            GblmError: of the kind that the process met, or it ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            hint = "; it was killed, most likely for want of memory" if code == -9 else ""
            raise GblmError(f"the benchmark process of {self._name!r} ended with exit status {code}{hint}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer


@contextmanager
def started(
    source: ModelSource, runtime: str, dtype: str, device: str, threads: int, settings: BenchmarkSettings
) -> Iterator[Worker]:
    """The model, loaded in a process that ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    setup = {
        "name": source.name,
        "folder": str(source.folder.absolute()),
        "runtime": runtime,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "batch": settings.batch,
        "prompt": settings.prompt,
        "generate": settings.generate,
    }
    try:
        yield Worker(process, setup)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Load the model named in the first request, then answer the others until stdin ends."""
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    silence_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        _serve(answer)
    except Exception as error:  # the parent raises it; a terminal has one program that speaks
        answer(failure(error))


def _serve(answer: Callable[[dict[str, Any]], None]) -> None:
    setup = json.loads(sys.stdin.readline())
    source = ModelSource(setup["name"], Path(setup["folder"]))
    task = loading.task_of(source)
    of_torch = setup["runtime"] in FOLDER_RUNTIMES
    with peak_memory(setup["device"], of_torch=of_torch) as memory:
        passes = (setup["prompt"], 1) if task.generates else (setup["prompt"],)
        where = setup["dtype"], setup["device"], setup["threads"]
        asked = {"runtime": setup["runtime"], "profile": passes, "generate": setup["generate"]}
        with memory.at_work():
            start = time.perf_counter()
            runtime = load_runtime(source, *where, **asked)
            loaded = time.perf_counter() - start
        kernels = [[runtime.kernels(batch * tokens) for tokens in passes] for batch in setup["batch"]]
        timed: Callable[..., dict[str, Any]]
        if task.generates:
            timed = partial(generate, cast(Generating, runtime), vocabulary(source))
        else:
            timed = partial(forward, runtime, task, loading.config_of(source))
        answer(
            {
                "load_seconds": loaded,
                "provider": runtime.provider,
                "dtype": runtime.dtype,
                "kernels": kernels,
                "step_ms": runtime.step_ms(),
            }
        )
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("finish"):
                break
            with memory.at_work():
                done = timed(**request)
            answer(done)
    answer({"peak_memory_bytes": memory.peak_bytes})


def failure(error: Exception) -> dict[str, str]:
    """An error as an answer: its message, and the name of the kind in `errors` that the parent raises it as."""
    if isinstance(error, GblmError):
        return {"error": str(error), "kind": type(error).__name__}
    if is_out_of_memory(error):
        advice = "give a smaller --batch, a shorter --prompt, or fewer models at a time"
        return {"error": f"memory ran out ({first_line(error)}); {advice}", "kind": NotEnoughMemoryError.__name__}
    said = f"{type(error).__name__}: {first_line(error)}"
    return {"error": f"a model cannot be timed ({said})", "kind": GblmError.__name__}


def vocabulary(source: ModelSource) -> int:
    """The number of different tokens that a model knows, by its `config.json`.

    Raises:
        ModelError: it does not say.
    """
    size: int | None = (source.config | (source.config.get("text_config") or {})).get("vocab_size")
    if size is None:
        raise ModelError(f"{source.name!r}: config.json has no vocab_size, of which prompts are drawn; add it")
    return size


def forward(
    runtime: Runtime, task: Task, config: Any, batch: int, prompt: int, generate: int, seed: int
) -> dict[str, Any]:
    """Time one forward pass of random samples, of a model that generates nothing.

    Returns:
        prefill_seconds: from the samples to the predictions.
    """
    sample = task.timed(config, batch, prompt, seed)
    start = time.perf_counter()
    runtime.predict(sample)
    return {"prefill_seconds": time.perf_counter() - start}


def generate(runtime: Generating, vocabulary: int, batch: int, prompt: int, generate: int, seed: int) -> dict[str, Any]:
    """Time one greedy generation from a prompt of random tokens.

    Returns:
        prefill_seconds: from the prompt to the first token (TTFT).
        decode_seconds: for the `generate - 1` tokens after it.
        tokens: what was generated, [batch][generate].
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator)
    start = time.perf_counter()
    token, cache = runtime.prefill(ids)
    first = time.perf_counter()
    tokens = [token]
    for _ in range(generate - 1):
        token, cache = runtime.decode(token, cache)
        tokens.append(token)
    end = time.perf_counter()
    return {
        "prefill_seconds": first - start,
        "decode_seconds": end - first,
        "tokens": torch.cat(tokens, dim=1).tolist(),
    }


if __name__ == "__main__":
    main()
