"""Every figure that was measured of a model, by name: what gates limit, tables show and model cards state."""

import math
from dataclasses import dataclass

from gblm_compress.measure.timings import Spread
from gblm_compress.measure.zero_shot import TWO_SIDED_95, Ratio, ZeroShot
from gblm_compress.runs.summary import ModelSummary

LESS_IS_BETTER = frozenset({"perplexity", "cross_entropy", "loss", "mean_kl", "bytes", "memory", "ttft_ms", "tpot_ms"})
"""Figures that are better when they are smaller; of all others more is better."""

TIMED = frozenset(
    {
        "memory",
        "ttft_ms",
        "tpot_ms",
        "tokens_per_second",
        "samples_per_second",
        "decode_speedup",
        "prefill_speedup",
    }
)
"""Figures that belong to a runtime, a dtype and a batch; all others are of the model alone."""


@dataclass(frozen=True)
class Figure:
    """A measured figure with the ends of its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def figures(row: ModelSummary, dense_bytes: int) -> dict[str, Figure]:
    """The figures of a row; those that were not measured are not there.

    Args:
        dense_bytes: of the dense model on disk.
    """
    found = {"bytes": Figure(row.bytes_on_disk), "bytes_ratio": Figure(row.bytes_on_disk / dense_bytes)}
    for name, metric in row.metrics.items():
        if metric.value is not None:
            found[name] = Figure(metric.value)
            if metric.dense and name not in LESS_IS_BETTER:
                found.setdefault("retained", Figure(metric.value / metric.dense))
            if metric.dense:
                found[f"{name}_increase"] = Figure(metric.value / metric.dense - 1)
    found |= {name: Figure(value) for name, value in row.fidelity.items() if value is not None}
    if row.tasks:
        found["task_accuracy"] = _accuracy(row.tasks)
        if row.tasks.recovery:
            found["task_recovery"] = _of_ratio(row.tasks.recovery)
    if timing := row.timing:
        found["memory"] = Figure(timing.peak_memory_bytes)
        for name, spread in (("ttft_ms", timing.ttft_ms), ("tpot_ms", timing.tpot_ms)):
            if spread:
                found[name] = Figure(spread.median, spread.p10, spread.p90)
        if timing.tpot_ms:
            found["tokens_per_second"] = _rate(timing.batch, timing.tpot_ms)
        else:
            found["samples_per_second"] = _rate(timing.batch, timing.ttft_ms)
        for name, speedup in (
            ("decode_speedup", timing.decode_speedup),
            ("prefill_speedup", timing.prefill_speedup),
        ):
            if speedup:
                found[name] = Figure(speedup.ratio, speedup.low, speedup.high)
    return found


def is_derived(name: str) -> bool:
    """Whether a figure follows from another one and the dense model's, so that both say the same of two runs."""
    return name in ("bytes_ratio", "retained") or name.endswith("_increase")


def _rate(batch: int, spread: Spread) -> Figure:
    """How many there are in a second, where a batch of them takes so many milliseconds."""
    return Figure(*(1000 * batch / end for end in (spread.median, spread.p90, spread.p10)))


def _accuracy(tasks: ZeroShot) -> Figure:
    """The mean accuracy with its 95 % interval; without one where a task has a single question."""
    errors = [task.error for task in tasks.tasks if task.error is not None]
    if len(errors) < len(tasks.tasks):
        return Figure(tasks.mean_accuracy)
    half = TWO_SIDED_95 * math.hypot(*errors) / len(errors)
    return Figure(tasks.mean_accuracy, tasks.mean_accuracy - half, tasks.mean_accuracy + half)


def _of_ratio(ratio: Ratio) -> Figure:
    return Figure(ratio.ratio, ratio.low, ratio.high)
