r"""How long a step of `recover` takes, part by part, beside two floors that are timed in the same run.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/recover.py PRUNED DENSE --data TEXT --json result.json

products  the products of all linear layers alone: forward in the dense model, forward and backward in the student.
bytes     a copy of as many bytes as a step must move at least: weights of both networks, gradients, masters and Adam's
          moments, once each.

The parts and the step are medians; the first steps are not counted.
"""

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from ending import exit_after
from torch.nn.functional import linear

from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.machine import environment
from gblm_compress.models import manifest
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import RecoverSettings
from gblm_compress.training import recovery
from gblm_compress.training.imitation import Imitation, Teacher
from gblm_compress.training.trainer import Trainer
from gblm_compress.training.weights import Weights

PARTS = {
    "step": (Trainer, "_step"),
    "dense model": (Teacher, "predictions"),
    "forward and loss": (Imitation, "__call__"),
    "gradients to masters": (Weights, "pull"),
    "Adam": (torch.optim.Adam, "step"),
    "weights to the network": (Weights, "show"),
}
"""What is timed in a step; the forward pass of the dense model is within that of the loss."""

WARM_UP = 3
RUNS = 5


def seconds_of(work: Callable[[], object]) -> float:
    """The median of some runs; the first is not counted."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def timed_steps(source: ModelSource, dense: ModelSource, settings: RecoverSettings) -> dict[str, float]:
    """{part: seconds in a step}, by a training of so many steps. What runs before the first step counts as its own."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    running: Counter[str] = Counter()

    def clocked(part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            running[part] += time.perf_counter() - start  # type: ignore[assignment]
            if part == "step":
                for each in PARTS:
                    spent[each].append(running[each])
                running.clear()
            return result

        return run

    patches = [patch.object(owner, name, clocked(part, getattr(owner, name))) for part, (owner, name) in PARTS.items()]
    patches.append(patch.object(recovery, "LOOKS", 1))  # none between two steps
    with tempfile.TemporaryDirectory() as folder:
        for each in patches:
            each.start()
        try:
            what = recovery.Recovery(source, dense, Path(folder) / "recovered", settings, "cpu")
            recovery.recover(what, Progress())
        finally:
            patch.stopall()
    parts = {part: median(times[WARM_UP:]) for part, times in spent.items()}
    parts["forward and loss"] -= parts["dense model"]
    others = sum(seconds for part, seconds in parts.items() if part != "step")
    return parts | {"backward, and the rest": parts["step"] - others}


def products(layers: list[tuple[int, int]], head: tuple[int, int], tokens: int, dtype: torch.dtype) -> float:
    """Seconds of the products of a step: of pruned layers forward twice and both of backward; of the head, whose
    weights are not trained, forward twice and one of backward.

    Args:
        layers, head: (outputs, inputs).
    """
    total = 0.0
    shapes = [(*shape, count, True) for shape, count in Counter(layers).items()] + [(*head, 1, False)]
    for out, into, count, trained in shapes:
        x, weight, upstream = (torch.randn(size, dtype=dtype) for size in ((tokens, into), (out, into), (tokens, out)))
        forward, backward = partial(linear, x, weight), partial(torch.mm, upstream, weight)
        seconds = 2 * seconds_of(forward) + seconds_of(backward)
        if trained:
            seconds += seconds_of(partial(torch.mm, upstream.mT, x))
        total += count * seconds
    return total


def moved_bytes(weights: int, survivors: int, head: int, seen: int) -> int:
    """The bytes of a step. Weights are read forward in both networks and backward, and written anew; their gradients
    are written, and read where they are packed. Packed gradients, masters and both moments are written and read.

    Args:
        weights: of pruned layers.
        head: weights of the head, read forward twice and backward.
        seen: bytes of a weight in a product.
    """
    return seen * (6 * weights + 3 * head) + 8 * 4 * survivors


def main() -> None:
    """Train some steps, time the floors, print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned")
    parser.add_argument("dense")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    silence_libraries()
    source, dense = (resolve_model(name, Progress(quiet=True)) for name in (options.pruned, options.dense))
    tokens, dtype = options.batch * options.sequence_length, faster_dtype("cpu", Ranks())
    settings = RecoverSettings(
        data=(options.data,),
        tokens=options.steps * tokens,
        batch=options.batch,
        sequence_length=options.sequence_length,
    )
    parts = timed_steps(source, dense, settings)
    layers = manifest.read(source.folder)["layers"]
    head = head_and_embedding(load_model(dense, dtype))[0]
    if head is None:
        parser.error(f"{options.dense} has no head")
    vocabulary = head.get_parameter("weight")
    compute, shapes = getattr(torch, dtype), [tuple(layer["shape"]) for layer in layers.values()]
    size = moved_bytes(
        sum(map(prod, shapes)),
        sum(layer["nonzeros"] for layer in layers.values()),
        vocabulary.numel(),
        compute.itemsize,
    )
    copied = torch.ones(min(size // 2, 1 << 29), dtype=torch.uint8)
    room = torch.empty_like(copied)
    floors = {
        "products": products(shapes, (vocabulary.shape[0], vocabulary.shape[1]), tokens, compute),
        "bytes": size / (2 * len(copied)) * seconds_of(lambda: room.copy_(copied)),
    }
    rate = tokens / parts["step"]
    print(f"{dtype}, {torch.get_num_threads()} threads, {tokens:,} tokens in a step: {rate:.0f} tokens/s")
    for name, seconds in parts.items():
        print(f"  {name:24} {1000 * seconds:8.0f} ms")
    for name, seconds in floors.items():
        print(f"  floor: {name:17} {1000 * seconds:8.0f} ms   {parts['step'] / seconds:.1f} × as long")
    if options.json:
        found = {"parts": parts, "floors": floors, "tokens_per_second": rate, "dtype": dtype, "tokens": tokens}
        options.json.write_text(json.dumps(found | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    exit_after(main)
