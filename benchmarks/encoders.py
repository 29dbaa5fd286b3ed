r"""What pruning costs a sentence encoder, by method, pattern and fit: the table of docs/results/encoders.md.

    python benchmarks/encoders.py MODEL --calibration articles.txt --pairs stsb.csv --passages held-out.txt \
        --folders PRUNED RECOVERED

Each row is pruned in memory from the dense model, but for those of `--folders`. The passages should be none of those
that are calibrated or trained on.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ending import exit_after
from torch import Tensor

from gblm_compress.models import loading, manifest
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune_
from gblm_compress.settings import CompareSettings
from gblm_compress.tasks.task import Sample, Task

PATTERNS = ("unstructured", "2:4")
METHODS = (
    "magnitude+none", "wanda+none", "gblm+none", "sparsegpt", "wanda+fast", "gblm+fast", "obs+fast", "gblm+balanced",
    "gblm+best", "obs+best",
)  # fmt: skip
BATCH = 64


@torch.inference_mode()
def measured(model: Any, task: Task, samples: Sequence[Sample]) -> list[Any]:
    """What `Task.measure` gives for every sample; those of one length run together, so that none is padded."""
    by_length: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_length.setdefault(sample["input_ids"].shape[1], []).append(index)
    found: dict[int, Any] = {}
    for places in by_length.values():
        for start in range(0, len(places), BATCH):
            batch = places[start : start + BATCH]
            arguments = [task.arguments(samples[index]) for index in batch]
            together = {name: torch.cat([one[name] for one in arguments]) for name in arguments[0]}
            predictions: Tensor = getattr(model(**together), task.output)
            for index, prediction in zip(batch, predictions, strict=True):
                judged = task.judged(prediction.unsqueeze(0), samples[index])
                found[index] = task.measure(judged, samples[index])
    return [found[index] for index in range(len(samples))]


def main() -> None:
    """Prune, evaluate, print a row, and write all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="Text for the statistics.")
    parser.add_argument("--pairs", required=True, help="A csv with two sentences and a score.")
    parser.add_argument("--passages", required=True, help="Text for the agreement of neighbours.")
    parser.add_argument("--limit", type=int, default=300, help="Passages at most.")
    parser.add_argument("--samples", type=int, default=128, help="Samples of the calibration text.")
    parser.add_argument("--length", type=int, default=64, help="Tokens in a sample at most.")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="As in `compare --methods`.")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="As in `compare --patterns`.")
    parser.add_argument("--folders", nargs="+", default=(), help="Models that `prune` or `recover` wrote.")
    parser.add_argument("-o", "--output", type=Path, help="JSON to write.")
    options = parser.parse_args()
    silence_libraries()
    progress = Progress(quiet=True)
    source = resolve_model(options.model, progress)
    dense, task = loading.load_model(source, "float32"), loading.task_of(source)
    with_model = loading.load_processor(source), dense.config
    drawn = task.calibration(*with_model, options.calibration, options.samples, options.length, 0)
    pairs = task.evaluation(*with_model, options.pairs, 256, None)
    passages = task.evaluation(*with_model, options.passages, options.length, options.limit)
    of_dense = [measured(dense, task, samples) for samples in (pairs, passages)]
    rows: list[dict[str, Any]] = []

    def show(name: str, pattern: str, model: Any, seconds: float) -> None:
        of_pairs, of_passages = (measured(model, task, samples) for samples in (pairs, passages))
        rows.append(
            {
                "method": name,
                "pattern": pattern,
                "spearman": task.metrics(of_pairs)["spearman"].value,
                "of_dense": task.metrics(of_pairs)["spearman"].value / task.metrics(of_dense[0])["spearman"].value,
                **task.agreement(of_dense[1], of_passages),
                "cosine": sum(float(a @ b) for (a, _), (b, _) in zip(of_dense[1], of_passages, strict=True))
                / len(passages),
                "seconds": seconds,
            }
        )
        print("  ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")

    show("dense", "", dense, 0.0)
    for pattern in options.patterns:
        for method in options.methods:
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            prune_(model, drawn, CompareSettings.prune_settings(method, pattern), progress)
            show(method, pattern, model, time.perf_counter() - start)
    for folder in options.folders:
        found = resolve_model(folder, progress)
        pattern = manifest.read(found.folder)["prune"]["pattern"]
        show(found.folder.name, pattern, loading.load_model(found, "float32"), 0)


if __name__ == "__main__":
    exit_after(main)
