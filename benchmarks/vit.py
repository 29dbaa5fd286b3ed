"""What pruning costs an image classifier, by method, pattern and fit: the tables of docs/results/images.md.

    python benchmarks/fashion_mnist.py images
    python benchmarks/vit.py MODEL --calibration images/train.parquet --dataset images/test.parquet -o table.json

Each row is pruned in memory from the dense model. The metrics are those of the task, with their standard errors.
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

from gblm_compress.models import loading
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune_
from gblm_compress.settings import CompareSettings, PruneSettings
from gblm_compress.tasks.metrics import mean_metric
from gblm_compress.tasks.task import Sample

PATTERNS = ("unstructured", "2:4")
METHODS = (
    "magnitude+none", "wanda+none", "gblm+none", "sparsegpt", "gblm+fast", "gblm+balanced", "gblm+best", "obs+best",
)  # fmt: skip
BATCH = 500


@torch.inference_mode()
def predictions(model: Any, samples: Sequence[Sample]) -> Tensor:
    """Logits [images, classes]."""
    pixels = torch.cat([sample["pixel_values"] for sample in samples])
    return torch.cat([model(pixel_values=batch).logits for batch in pixels.split(BATCH)])


def main() -> None:
    """Prune, evaluate, print a row, and write all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="The dataset to calibrate on.")
    parser.add_argument("--dataset", required=True, help="The dataset to evaluate on.")
    parser.add_argument("--samples", type=int, default=128, help="Images to calibrate on.")
    parser.add_argument("--drawn-labels", action="store_true", help="Calibrate as if the data had no labels.")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="As in `compare --methods`.")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="As in `compare --patterns`.")
    parser.add_argument("--sparsity", type=float, help="Sparsity of unstructured patterns; 0.5 unless given.")
    parser.add_argument("-o", "--output", type=Path, help="JSON to write; rows that are there stay.")
    options = parser.parse_args()
    silence_libraries()
    progress = Progress(quiet=True)
    source = resolve_model(options.model, progress)
    dense, task = loading.load_model(source, "float32"), loading.task_of(source)
    with_model = loading.load_processor(source), dense.config
    drawn = task.calibration(*with_model, options.calibration, options.samples, 2, 0)
    if options.drawn_labels:
        drawn = [{name: value for name, value in sample.items() if name != "labels"} for sample in drawn]
    samples = list(task.evaluation(*with_model, options.dataset, 2, None))
    of_dense = predictions(dense, samples)
    kept = options.output is not None and options.output.exists()
    rows: list[dict[str, Any]] = json.loads(options.output.read_text()) if kept else []

    def show(method: str, pattern: str, model: Any, seconds: float) -> None:
        logits = predictions(model, samples)
        pairs = zip(logits.split(1), samples, strict=True)
        metrics = task.metrics([task.measure(judged, sample) for judged, sample in pairs])
        close = [task.fidelity(one, other) for one, other in zip(of_dense.split(1), logits.split(1), strict=True)]
        fidelity = {name: mean_metric([one[name] for one in close]).value for name in close[0]}
        linear = [layer.weight for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear)]
        zeros = sum(int((weight == 0).sum()) for weight in linear) / sum(weight.numel() for weight in linear)
        measured = {name: round(metric.value, 5) for name, metric in metrics.items()}
        errors = {f"{name}_error": round(metric.error or 0, 5) for name, metric in metrics.items()}
        row = {
            "method": method,
            "pattern": pattern,
            "zeros": round(zeros, 4),
            "labels": "drawn" if options.drawn_labels else "data",
            **measured,
            **errors,
            **{name: round(value, 5) for name, value in fidelity.items()},
            "images": len(samples),
            "samples": options.samples,
            "seconds": round(seconds, 1),
        }
        rows.append(row)
        print("  ".join(f"{value}" for value in row.values()), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")

    if not rows:
        show("dense", "", dense, 0.0)
    for pattern in options.patterns:
        for method in options.methods:
            model = copy.deepcopy(dense)
            chosen = CompareSettings.prune_settings(method, pattern)
            if options.sparsity is not None and chosen.uniform_budget.pattern.n_m is None:
                chosen = PruneSettings(**chosen.model_dump(exclude_unset=True), sparsity=options.sparsity)
            start = time.perf_counter()
            prune_(model, drawn, chosen, progress)
            show(method, pattern, model, time.perf_counter() - start)


if __name__ == "__main__":
    exit_after(main)
