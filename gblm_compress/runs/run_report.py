"""Everything a run found out. `report.json` is this, and all that people see is made of it."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gblm_compress.errors import UsageError, first_line
from gblm_compress.runs.cells import CompareResult
from gblm_compress.runs.figures import Figure, figures
from gblm_compress.runs.gates import GateOutcome
from gblm_compress.runs.reuse import Outcome
from gblm_compress.runs.summary import LayerSummary, ModelSummary, RecoveryLook
from gblm_compress.storage import records

REPORT = "report.json"


@dataclass(frozen=True)
class RunReport:
    """Everything a run found out.

    Attributes:
        model: the dense model, as the recipe names it.
        method: what was done to it, in words.
        finished: when, in UTC, as ISO 8601 writes it.
        conditions: under which the figures were measured, {what: in words}.
        commands: that do it again.
        rows: every model in every runtime at every batch size; the dense one comes first.
        gates: each with its limit and what was measured.
        layers: the pruned ones.
        recovery: the looks at held-out text, in their order; none where the recipe has no `recover`.
        comparison: the grid of methods, when the recipe has one.
    """

    recipe: dict[str, Any]
    output: str
    environment: dict[str, Any]
    stages: list[Outcome]
    rows: list[ModelSummary]
    gates: list[GateOutcome] = field(default_factory=list)
    comparison: CompareResult | None = None
    model: str = ""
    method: str = ""
    finished: str = ""
    conditions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    layers: list[LayerSummary] = field(default_factory=list)
    recovery: list[RecoveryLook] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    @property
    def failed_gates(self) -> list[GateOutcome]:
        """The gates that do not hold."""
        return [gate for gate in self.gates if not gate.passed]

    @property
    def pruned_rows(self) -> list[ModelSummary]:
        """The rows that are no baseline."""
        return [row for row in self.rows if not row.dense]

    def figures(self, row: ModelSummary) -> dict[str, Figure]:
        """What was measured of a row."""
        return figures(row, self.rows[0].bytes_on_disk)

    def baseline(self, row: ModelSummary) -> ModelSummary | None:
        """The dense row that a row is timed beside: of its runtime, dtype and batch."""
        lane = (row.runtime, row.dtype, row.batch)
        return next((r for r in self.rows if r.dense and (r.runtime, r.dtype, r.batch) == lane), None)

    @property
    def best(self) -> ModelSummary | None:
        """What the headline is about: the artefact that decodes fastest for sure, else the smallest evaluated."""
        rows = [row for row in self.pruned_rows if row.batch in (None, self.smallest_batch)]
        return max(rows, key=self._merit, default=None)

    @property
    def smallest_batch(self) -> int | None:
        """The smallest batch that was timed."""
        return min((row.batch for row in self.rows if row.batch is not None), default=None)

    def _merit(self, row: ModelSummary) -> tuple[float, bool, int]:
        speedup = self.figures(row).get("decode_speedup")
        sure = max(speedup.low or 0.0, 1.0) if speedup else 1.0
        return (sure, bool(row.metrics), -row.bytes_on_disk)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


def read(folder: Path) -> RunReport:
    """The report of a run, from the folder of the run or its `report.json`.

    Raises:
        UsageError: there is none, or it is not one that this version wrote.
    """
    path = folder / REPORT if folder.is_dir() else folder
    try:
        return TypeAdapter(RunReport).validate_python(records.read_json(path))
    except OSError as error:
        raise UsageError(
            f"{str(folder)!r} holds no report of a run ({error.strerror or error}); give the folder that "
            "`gblm-compress run` wrote"
        ) from error
    except (ValidationError, ValueError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault else first_line(error)
        raise UsageError(
            f"{str(path)!r} is no report of this version ({said}); `gblm-compress run` writes it anew and reuses "
            "every finished stage"
        ) from error


def when(report: RunReport) -> str:
    """The end of a run, to the minute."""
    return f"{report.finished[:16].replace('T', ' ')} UTC"


def headline(report: RunReport) -> str:
    """Size, speed and quality of the best artefact beside the dense model, in one sentence."""
    return headline_of(report, report.best) if report.best else "Nothing was measured."


def headline_of(report: RunReport, row: ModelSummary) -> str:
    """The same of any artefact."""
    found, parts = report.figures(row), []
    parts.append(f"{found['bytes_ratio'].value:.2f}× the bytes of the dense model")
    if speedup := found.get("decode_speedup"):
        parts.append(_speed("decodes", speedup))
    elif speedup := found.get("prefill_speedup"):
        parts.append(_speed("runs", speedup))
    for name, metric in list(row.metrics.items())[:1]:
        dense = f"{number(metric.dense)} → " if metric.dense is not None else ""
        parts.append(f"{name} {dense}{number(metric.value, metric.error)}")
    if "top1_agreement" in found:
        of = "tokens" if "perplexity" in row.metrics else "predictions"
        parts.append(f"the same answer as dense in {100 * found['top1_agreement'].value:.0f} % of {of}")
    if "task_recovery" in found:
        kept = found["task_recovery"]
        parts.append(f"{kept.value:.2f}× the accuracy on tasks{interval(kept)}")
    place = f"; on {report.conditions['machine']}, {row.where}" if row.timing and "machine" in report.conditions else ""
    return f"{row.model}: {', '.join(parts)}{place}."


def _speed(verb: str, speedup: Figure) -> str:
    if (speedup.low or 0) > 1:
        return f"{verb} {speedup.value:.2f}× as fast{interval(speedup)}"
    if (speedup.high or 2) < 1:
        return f"{verb} {speedup.value:.2f}× as fast{interval(speedup)}, which is slower"
    return f"{verb} no faster for sure ({speedup.value:.2f}×{interval(speedup)})"


def interval(figure: Figure, digits: int = 2) -> str:
    """The ends of a figure's interval; nothing where it has none."""
    return "" if figure.low is None or figure.high is None else f" [{figure.low:.{digits}f}–{figure.high:.{digits}f}]"


def number(value: float | None, error: float | None = None) -> str:
    """A figure with as many digits as say something, and its standard error where there is one."""
    if value is None or not math.isfinite(value):
        return "not finite"
    digits = 2 if abs(value) >= 1 else 3
    return f"{value:z.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")
