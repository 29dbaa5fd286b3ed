"""A report made by hand, with everything in it that a report can hold."""

from pathlib import Path

from gblm_compress.measure.timings import Measurement, Speedup, Spread
from gblm_compress.measure.zero_shot import Ratio, TaskResult, ZeroShot
from gblm_compress.runs.cells import CompareResult, MethodSummary
from gblm_compress.runs.gates import GateOutcome
from gblm_compress.runs.reuse import Outcome
from gblm_compress.runs.run_report import REPORT, RunReport
from gblm_compress.runs.summary import LayerSummary, ModelSummary, Quality, RecoveryLook
from gblm_compress.storage import records

HOSTILE = "[/]$\\frac{$\x1b[2J\udcff<script>alert(1)</script>|`\n"


def spread(median: float) -> Spread:
    return Spread(median, 0.9 * median, 1.1 * median)


def row(model: str, tpot: float | None, bytes_: int, perplexity: float | None, dense: bool = False, batch: int = 1):
    """A row of a model that is timed beside one of 20 ms per token."""
    timing = None
    if tpot is not None:
        timing = Measurement(
            model=model, runtime="torch", provider="cpu", dtype="float32", batch=batch, ttft_ms=spread(5 * tpot),
            tpot_ms=spread(tpot), tokens_per_second=1000 * batch / tpot, samples_per_second=None,
            peak_memory_bytes=3 * bytes_,
            load_seconds=1.5, bytes_on_disk=bytes_, prefill_kernels={"Linear": 7}, decode_kernels={"Bitmask": 7},
            prefill_speedup=None if dense else Speedup.of(spread(100), spread(5 * tpot)),
            step_ms={"packed products": tpot / 2, "rest": tpot / 4},
            decode_speedup=None if dense else Speedup.of(spread(20), spread(tpot)),
        )  # fmt: skip
    metrics = {} if perplexity is None else {"perplexity": Quality(perplexity, None if dense else 0.5, 20.0)}
    recovery = Ratio(0.9, 0.8, 1.0)
    tasks = ZeroShot((TaskResult("piqa", "acc", 0.6, 0.05, 100, 0.66, recovery),), 0.6, recovery)
    return ModelSummary(
        model=model, dense=dense, runtime="torch", dtype="float32" if timing else None,
        batch=batch if timing else None, metrics=metrics,
        fidelity={} if dense or perplexity is None else {"mean_kl": 0.2, "top1_agreement": 0.81},
        tasks=None if dense or perplexity is None else tasks, nonzero_fraction=1.0 if dense else 0.5,
        bytes_on_disk=bytes_, timing=timing,
    )  # fmt: skip


def report(name: str = "bitmask", tpot: float = 10.0, perplexity: float = 24.0, **changes) -> RunReport:
    """A run of a model of 1 MB, whose export `name` takes 0.6 MB."""
    rows = [
        row("dense", 20.0, 1_000_000, 20.0, dense=True),
        row("pruned", 19.5, 1_000_000, perplexity),
        row(name, tpot, 600_000, perplexity),
        row("semi-structured", None, 590_000, None),
    ]
    grid = [
        MethodSummary(method, pattern, 2, value, 0.5, value / 100, 0.01, None, None, seconds, 10**9)
        for method, pattern, value, seconds in (("gblm", "2:4", 24.0, 30.0), (name, "unstructured", 22.0, 20.0))
    ]
    comparison = CompareResult("tiny", 20.0, grid, [], {}, {})
    layers = [
        LayerSummary(f"model.layers.{block}.mlp.{part}", block, f"mlp.{part}", "2:4", 4096, 2048, 0.1 * (block + 1))
        for block in range(3)
        for part in ("up_proj", name)
    ]
    looks = ((0, 0.9, 0.0), (4000, 0.5, 0.02), (8000, 0.4, 0.05), (12_000, 0.45, 0.06))
    recovery = [RecoveryLook(tokens, kl, moved, kept=tokens == 8000) for tokens, kl, moved in looks]
    values = {
        "recipe": {"model": name},
        "output": f"runs/{name}",
        "environment": {"gblm_compress": "0.1.0"},
        "stages": [Outcome("prune", False, 3.25, {}), Outcome(f"export {name}", True, 1.0, {})],
        "rows": rows,
        "gates": [
            GateOutcome("min_decode_speedup", f"{name} in torch, batch 1", 1.3, 2.0, True, 1.6, name),
            GateOutcome("max_bytes", name, 500_000, 600_000, False, None, name),
        ],
        "comparison": comparison,
        "model": name,
        "method": "50 % zeros by gblm",
        "finished": "2026-01-02T03:04:05+00:00",
        "conditions": {"machine": "a CPU, 2 threads, cpu", "timing": name},
        "commands": [f"gblm-compress run {name}"],
        "layers": layers,
        "recovery": recovery,
    }
    return RunReport(**values | changes)


def write_report(run: Path, **changes) -> None:
    """What `report` and `push` read of a run, in its folder."""
    run.mkdir(exist_ok=True)
    records.write_text(run / REPORT, records.as_json(report(**changes).as_dict()))
