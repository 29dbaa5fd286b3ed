"""The figures of a run, one row each. Gates, tables, charts and the page are made from rows."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from rich.filesize import decimal

from gblm_compress.measure.timings import NO_SPEED_UP
from gblm_compress.measure.zero_shot import TWO_SIDED_95
from gblm_compress.settings import GATES, GateSettings

LESS_IS_BETTER = frozenset({"perplexity", "cross_entropy", "loss", "mean_kl", "bytes", "memory", "ttft_ms", "tpot_ms"})
"""Figures that are better when they are smaller. More is better for all others."""
DENSE = "dense"
SIZE = ("bytes", "bytes_ratio", "density")
UNITS = {
    "bytes": ("bytes", "memory"),
    "%": ("agreement", "accuracy", "increase", "density", "zeros", "output_error"),
    "×": ("speedup", "ratio", "recovery", "retained"),
    "ms": ("_ms",),
    "count": ("kernels", "questions", "weights"),
}
"""{unit: endings of its figures' names}."""


@dataclass(frozen=True)
class Row:
    artefact: str  # its folder's name, `DENSE` for the recipe's model, or a compared method
    figure: str
    value: float | None  # None if not finite
    low: float | None = None  # ends of the interval: p10 and p90 of a time, 95 % of an accuracy
    high: float | None = None
    error: float | None = None
    baseline: float | None = None  # the same figure of the dense model
    dense: bool = False
    part: str = ""  # the layer, task, kernel, pattern or part of a step
    runtime: str = ""
    dtype: str | None = None
    batch: int | None = None
    tokens: int | None = None  # trained on so far, in a recovery

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)

    @property
    def where(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        return f"{self.artefact} in {self.runtime}{batch}" if self.runtime else self.artefact

    @property
    def lane(self) -> tuple[str, str | None, int | None]:
        """Timings with the same lane can be compared."""
        return self.runtime, self.dtype, self.batch

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that are not set."""
        values = {field: getattr(self, field.name) for field in fields(self)}
        return {field.name: value for field, value in values.items() if value != field.default}


def rows_of(model: Mapping[str, Any], dense_bytes: int) -> Iterator[Row]:
    """The rows of an artefact and a timing of it, from plain values; `metrics` are {name: (value, error, dense)}."""
    row = partial(Row, model["model"], dense=model["dense"])
    yield row("bytes", model["bytes_on_disk"])
    yield row("bytes_ratio", model["bytes_on_disk"] / dense_bytes)
    yield row("density", model["nonzero_fraction"])
    more_is_better = [name for name in model["metrics"] if name not in LESS_IS_BETTER]
    for name, (value, error, dense) in model["metrics"].items():
        yield row(name, value, error=error, baseline=dense)
        if dense:
            ratio = math.nan if value is None else value / dense
            yield row(f"{name}_increase", ratio - 1)
            if name in more_is_better[:1]:
                yield row("retained", ratio)
    for name, value in model["fidelity"].items():
        yield row(name, value)
    if model["tasks"]:
        yield from _tasks(row, model["tasks"])
    if model["timing"]:
        yield from _timing(row, model["timing"])


def _tasks(row: Any, found: Mapping[str, Any]) -> Iterator[Row]:
    errors, mean = [task["error"] for task in found["tasks"]], found["mean_accuracy"]
    half = None if None in errors else TWO_SIDED_95 * math.hypot(*errors) / len(errors)
    yield row("task_accuracy", mean) if half is None else row("task_accuracy", mean, mean - half, mean + half)
    if ratio := found["recovery"]:
        yield row("task_recovery", ratio["ratio"], ratio["low"], ratio["high"])
    for task in found["tasks"]:
        each = partial(row, part=f"{task['task']} ({task['metric']})")
        yield each("accuracy", task["accuracy"], error=task["error"])
        yield each("questions", task["questions"])
        if task["dense_accuracy"] is not None:
            yield each("dense_accuracy", task["dense_accuracy"])
        if ratio := task["recovery"]:
            yield each("recovery", ratio["ratio"], ratio["low"], ratio["high"])


def _timing(row: Any, timing: Mapping[str, Any]) -> Iterator[Row]:
    at = partial(row, runtime=timing["runtime"], dtype=timing["dtype"], batch=timing["batch"])
    yield at("memory", timing["peak_memory_bytes"])
    for name in ("ttft_ms", "tpot_ms"):
        if spread := timing[name]:
            yield at(name, spread["median"], spread["p10"], spread["p90"])
    spread = timing["tpot_ms"] or timing["ttft_ms"]
    rate = [1000 * timing["batch"] / spread[end] for end in ("median", "p90", "p10")]
    yield at("tokens_per_second" if timing["tpot_ms"] else "samples_per_second", *rate)
    for name in ("decode_speedup", "prefill_speedup"):
        if speedup := timing[name]:
            yield at(name, speedup["ratio"], speedup["low"], speedup["high"])
    for name in ("prefill_kernels", "decode_kernels"):
        for kernel, count in (timing[name] or {}).items():
            yield at(name, count, part=kernel)
    for part, ms in timing["step_ms"].items():
        yield at("step_ms", ms, part=part)


def layer_rows(artefact: str, layers: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    for name, layer in layers.items():
        weights = layer["shape"][0] * layer["shape"][1]
        yield Row(artefact, "weights", weights, part=name)
        yield Row(artefact, "zeros", 1 - layer["nonzeros"] / weights, part=name)
        if layer.get("output_error") is not None:
            yield Row(artefact, "output_error", layer["output_error"], part=name)


def recovery_rows(artefact: str, curve: Iterable[Mapping[str, Any]], best: int) -> Iterator[Row]:
    """The validation losses of a training; the weights with index `best` were kept."""
    for number, look in enumerate(curve):
        part = "kept" if number == best else "not kept"
        yield Row(artefact, "held_out_loss", look["held_out"], part=part, tokens=look["tokens"])


def unit_of(figure: str) -> str:
    """A key of `UNITS`, or "" for a plain number."""
    return next((unit for unit, endings in UNITS.items() if figure.endswith(endings)), "")


def amount(figure: str, value: float | None, error: float | None = None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    unit = unit_of(figure)
    if unit == "bytes":
        return decimal(int(value))
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "%":
        value, error = 100 * value, None if error is None else 100 * error
    digits = 1 if unit == "%" else 0 if abs(value) >= 1000 else 2 if abs(value) >= 1 else 3
    spread = "" if error is None else f" ±{error:.{digits}f}"
    return f"{value:z,.{digits}f}{spread}{unit if unit in ('', '×') else ' ' + unit}"


def interval(row: Row) -> str:
    return "" if row.low is None or row.high is None else f" [{row.low:.2f}–{row.high:.2f}]"


@dataclass(frozen=True)
class GateOutcome:
    """A gate with its result. `bound` is the worse end of the interval. If `measured` is None, the gate fails."""

    gate: str
    subject: str
    limit: float
    measured: float | None
    passed: bool
    bound: float | None = None
    artefact: str | None = None

    @property
    def sentence(self) -> str:
        figure = self.gate[4:]
        limit = f"{'at least' if self.gate.startswith('min_') else 'at most'} {amount(figure, self.limit)} is needed"
        if self.measured is None:
            return f"{self.gate} on {self.subject}; {limit}"
        end = "" if self.bound is None else f" (worse end {amount(figure, self.bound)})"
        return f"{self.gate} on {self.subject}: {amount(figure, self.measured)}{end}; {limit}"


def check_gates(groups: Sequence[GateSettings], rows: Sequence[Row]) -> list[GateOutcome]:
    """The outcome of every gate: on every artefact for quality, else on the best one at each batch size.

    A speed-up must be significant, unless its artefact is named. A quality that is not finite fails.
    """
    outcomes: list[GateOutcome] = []
    measured = [row for row in rows if not row.dense and not row.part]
    for group in groups:
        for name, limit in group.limits.items():
            found = [row for row in measured if row.figure == name[4:] and group.artefact in (None, row.artefact)]
            if GATES[name] not in ("evaluate", "tasks"):
                found = _best_of_each_batch(name, [row for row in found if row.value is not None])
            outcomes += [_outcome(name, limit, row, significant=group.artefact is None) for row in found]
            if not found:
                subject = f"{group.artefact or 'all artefacts'}: not measured"
                outcomes.append(GateOutcome(name, subject, limit, None, False, artefact=group.artefact))
    return outcomes


def _best_of_each_batch(name: str, rows: list[Row]) -> list[Row]:
    best, batches = max if name.startswith("min_") else min, sorted({row.batch or 0 for row in rows})
    same = [[row for row in rows if (row.batch or 0) == batch] for batch in batches]
    return [best(group, key=partial(_worse_end, name)) for group in same]


def _outcome(name: str, limit: float, row: Row, significant: bool) -> GateOutcome:
    if row.value is None:
        return GateOutcome(name, f"{row.where}: not finite", limit, None, False, artefact=row.artefact)
    end, subject = _worse_end(name, row), row.where
    passed = end >= limit if name.startswith("min_") else end <= limit
    if significant and name.endswith("speedup") and (row.low or 0) <= 1:
        subject, passed = f"best of all, {subject}: {NO_SPEED_UP}", False
    return GateOutcome(name, subject, limit, row.value, passed, None if row.low is None else end, row.artefact)


def _worse_end(name: str, row: Row) -> float:
    end = row.low if name.startswith("min_") else row.high
    assert row.value is not None
    return row.value if end is None else end
