"""One model in a process of its own, timed on request: `python -m gblm_compress.benchmark_worker`.

A process per model keeps peak memory and load time apart; the parent (`benchmarking`) asks them in turn, so
that all models see the same machine. Requests and answers are lines of JSON on stdin and stdout.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gblm_compress.errors import GblmError
from gblm_compress.memory import peak_memory
from gblm_compress.runtimes import Runtime, load_runtime
from gblm_compress.sources import ModelSource, silence_libraries


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

    setup = json.loads(sys.stdin.readline())
    source = ModelSource(setup["name"], Path(setup["folder"]))
    with peak_memory(setup["device"]) as memory:
        try:
            start = time.perf_counter()
            passes = (setup["prompt"], 1)
            runtime = load_runtime(source, setup["dtype"], setup["device"], setup["threads"], profile=passes)
            loaded = time.perf_counter() - start
        except GblmError as error:
            answer({"error": str(error), "kind": type(error).__name__})
            return
        kernels = [[runtime.kernels(batch * tokens) for tokens in passes] for batch in setup["batch"]]
        facts = {"provider": runtime.provider, "dtype": runtime.dtype, "kernels": kernels}
        answer({"load_seconds": loaded, **facts})
        vocabulary = source.config["vocab_size"]
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("finish"):
                break
            answer(generate(runtime, vocabulary, **request))
    answer({"peak_memory_bytes": memory.peak_bytes})


def generate(runtime: Runtime, vocabulary: int, batch: int, prompt: int, generate: int, seed: int) -> dict[str, Any]:
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
