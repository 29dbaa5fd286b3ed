"""A report made by hand, with everything in it that a report can hold."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from gblm_compress.measure.timings import Speedup, Spread
from gblm_compress.models.source import ModelSource
from gblm_compress.runs import rows
from gblm_compress.runs.job import record_path
from gblm_compress.runs.rows import GateOutcome, Row
from gblm_compress.runs.run_report import REPORT, Outcome, RunReport
from gblm_compress.storage import records

HOSTILE = "[/]$\\frac{$\x1b[2J\udcff<script>alert(1)</script>|`\n"
DENSE_BYTES = 1_000_000
RATIO = {"ratio": 0.9, "low": 0.8, "high": 1.0}
TASK = {"task": "piqa", "metric": "acc", "accuracy": 0.6, "error": 0.05, "questions": 100, "dense_accuracy": 0.66,
        "recovery": RATIO}  # fmt: skip


def spread(median: float) -> Spread:
    return Spread(median, 0.9 * median, 1.1 * median)


def model(name: str, tpot: float | None, bytes_: int, perplexity: float | None, dense: bool = False, batch: int = 1):
    """An artefact as plain values, timed beside one of 20 ms per token."""
    timing = tpot and {
        "runtime": "torch", "dtype": "float32", "batch": batch,
        "ttft_ms": vars(spread(5 * tpot)), "tpot_ms": vars(spread(tpot)),
        "peak_memory_bytes": 3 * bytes_, "prefill_kernels": {"Linear": 7}, "decode_kernels": {"Bitmask": 7},
        "prefill_speedup": None if dense else vars(Speedup.of(spread(100), spread(5 * tpot))),
        "decode_speedup": None if dense else vars(Speedup.of(spread(20), spread(tpot))),
        "step_ms": {"packed products": tpot / 2, "rest": tpot / 4},
    }  # fmt: skip
    evaluated = perplexity is not None and not dense
    metrics = (perplexity, None, None) if dense else (perplexity, 0.5, 20.0)
    return {
        "model": name, "dense": dense, "metrics": {} if perplexity is None else {"perplexity": metrics},
        "fidelity": {"mean_kl": 0.2, "top1_agreement": 0.81} if evaluated else {},
        "tasks": {"tasks": [TASK], "mean_accuracy": 0.6, "recovery": RATIO} if evaluated else None,
        "nonzero_fraction": 1.0 if dense else 0.5, "bytes_on_disk": bytes_, "timing": timing,
    }  # fmt: skip


def measured(*models: dict[str, Any]) -> list[Row]:
    """The rows of artefacts beside the dense model of `report`."""
    return list(dict.fromkeys(row for each in models for row in rows.rows_of(each, DENSE_BYTES)))


def models(name: str = "bitmask", tpot: float = 10.0, perplexity: float = 24.0) -> list[dict[str, Any]]:
    """The dense model of 1 MB, the pruned one, an export `name` of 0.6 MB, and one that is not measured."""
    return [
        model("dense", 20.0, DENSE_BYTES, 20.0, dense=True),
        model("pruned", 19.5, DENSE_BYTES, perplexity),
        model(name, tpot, 600_000, perplexity),
        model("semi-structured", None, 590_000, None),
    ]


def in_8_bits() -> list[dict[str, Any]]:
    """An export in 8 bits of 180 kB, and that of the dense model, of 300 kB, beside which alone it is timed."""
    made = model("onnx-int8", 10.0, 180_000, 24.0), model("dense-onnx-int8", 20.0, 300_000, None, dense=True)
    return [each | {"timing": each["timing"] | {"runtime": "onnxruntime", "dtype": "int8"}} for each in made]


def results(name: str) -> list[Row]:
    """The rows of pruned layers and of a training."""
    layers = {
        f"model.layers.{block}.mlp.{part}": {"shape": [64, 64], "nonzeros": 2048, "output_error": 0.1 * (block + 1)}
        for block in range(3)
        for part in ("up_proj", name)
    }
    curve = [{"tokens": 4000 * number, "held_out": loss} for number, loss in enumerate((0.9, 0.5, 0.4, 0.45))]
    return [*rows.layer_rows("pruned", layers), *rows.recovery_rows("recovered", curve, 2)]


def report(name: str = "bitmask", tpot: float = 10.0, perplexity: float = 24.0, **changes) -> RunReport:
    """A run of a model of 1 MB, whose export `name` takes 0.6 MB."""
    made = RunReport(
        recipe={"model": name},
        output=f"runs/{name}",
        environment={"gblm_compress": "0.2.0"},
        stages=[Outcome("prune", False, 3.25, {}), Outcome(f"export {name}", True, 1.0, {})],
        rows=[*measured(*models(name, tpot, perplexity)), *results(name)],
        gates=[
            GateOutcome("min_decode_speedup", f"{name} in torch, batch 1", 1.3, 2.0, True, 1.6, name),
            GateOutcome("max_bytes", name, 500_000, 600_000, False, None, name),
        ],
        model=name,
        method="50 % zeros by gblm",
        finished="2026-01-02T03:04:05+00:00",
        conditions={"machine": "a CPU, 2 threads, cpu", "timing": name, "evaluation": name},
        commands=[f"gblm-compress run {name}"],
    )
    return replace(made, **changes)


def write_report(run: Path, **changes) -> None:
    """What `report` and `push` read of a run, in its folder."""
    run.mkdir(exist_ok=True)
    records.write_file(run / REPORT, records.as_json(report(**changes).as_dict()))


def write_artefact(run: Path, model: Path, card: str) -> None:
    """The artefact of such a run: the files of a model, a card, and the record of its export."""
    folder, record = shutil.copytree(model, run / "bitmask"), record_path("export bitmask", run)
    (folder / "README.md").write_text(card)
    (folder / "gblm_manifest.json").write_text("{}")
    record.parent.mkdir()
    content = ModelSource("bitmask", folder).fingerprint
    records.write_sealed(record, {"key": "", "content": content, "seconds": 1.0, "result": {}})
