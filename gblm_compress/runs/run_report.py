"""The report of a run, as in `report.json`; pages, tables and charts are made from it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gblm_compress.errors import UsageError, first_line
from gblm_compress.runs.rows import DENSE, SIZE, GateOutcome, Row, amount, interval
from gblm_compress.storage import records

REPORT = "report.json"
POSITIVE = ("bytes", "bytes_ratio", "weights")
"""Figures that must be greater than 0."""


@dataclass(frozen=True)
class Outcome:
    """A finished stage with its result as plain values."""

    name: str
    reused: bool
    seconds: float
    result: dict[str, Any]


@dataclass(frozen=True)
class RunReport:
    """All results of a run. `rows` begin with the dense model; `commands` repeat the run."""

    recipe: dict[str, Any]
    output: str
    environment: dict[str, Any]
    stages: list[Outcome]
    rows: list[Row]
    gates: list[GateOutcome] = field(default_factory=list)
    model: str = ""
    method: str = ""
    finished: str = ""
    conditions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failed_gates

    @property
    def failed_gates(self) -> list[GateOutcome]:
        return [gate for gate in self.gates if not gate.passed]

    @property
    def metrics(self) -> list[str]:
        """The metrics of the task, the main one first."""
        of_dense = [row.figure for row in self.rows if row.artefact == DENSE and not row.runtime]
        return [name for name in of_dense if name not in SIZE]

    @property
    def fidelity(self) -> list[str]:
        """Figures that compare predictions with the dense model's."""
        of_pruned = [row.figure for row in self.rows if not (row.dense or row.part or row.runtime)]
        others = (*SIZE, *self.metrics, "retained", *(f"{name}_increase" for name in self.metrics))
        return [name for name in dict.fromkeys(of_pruned) if name not in others and not name.startswith("task_")]

    @property
    def generates(self) -> bool:
        return any(row.figure == "tpot_ms" for row in self.rows)

    @property
    def smallest_batch(self) -> int | None:
        return min((row.batch for row in self.rows if row.batch is not None), default=None)

    def find(self, figure: str, artefact: str | None = None) -> list[Row]:
        rows = [row for row in self.rows if row.figure == figure and row.value is not None]
        return [row for row in rows if artefact in (None, row.artefact)]

    @property
    def best(self) -> str | None:
        """The artefact of the headline: the fastest with certainty, else the smallest one evaluated."""
        made = dict.fromkeys(row.artefact for row in self.find("bytes") if not row.dense)
        return max(made, key=self._merit, default=None)

    def _merit(self, artefact: str) -> tuple[float, bool, float]:
        speedup = self.speedup("decode_speedup", artefact)
        evaluated = any(self.find(name, artefact) for name in self.metrics)
        return max((speedup and speedup.low) or 0, 1.0), evaluated, -(self.find("bytes", artefact)[0].value or 0)

    def speedup(self, figure: str, artefact: str) -> Row | None:
        """The best speed-up of an artefact at the smallest batch."""
        found = [row for row in self.find(figure, artefact) if row.batch == self.smallest_batch]
        return max(found, key=lambda row: row.low or 0, default=None)

    def baseline_of(self, speedup: Row) -> str:
        """The dense artefact that was timed in the same lane."""
        return next(
            (row.artefact for row in self.rows if row.dense and row.runtime and row.lane == speedup.lane), DENSE
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.as_dict() for row in self.rows], "passed": self.passed}


def read(folder: Path) -> RunReport:
    """The report of a run, from its folder or its `report.json`."""
    path = folder / REPORT if folder.is_dir() else folder
    try:
        report = TypeAdapter(RunReport).validate_python(records.read_json(path))
        for number, row in enumerate(report.rows):
            if row.figure in POSITIVE and not (row.value or 0) > 0:
                raise ValueError(f"rows.{number}: {row.figure} of {row.where} should be greater than 0")
        return report
    except OSError as error:
        raise UsageError(
            f"{str(folder)!r} holds no report of a run ({error.strerror or error}); give the folder that "
            "`gblm-compress run` wrote"
        ) from error
    except ValueError as error:  # pydantic's ValidationError is one
        fault = error.errors()[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault else first_line(error)
        raise UsageError(
            f"{str(path)!r} is no report that this version reads ({said}); `gblm-compress run` writes it anew, "
            "and does the stages of another version again"
        ) from error


def headline(report: RunReport, artefact: str | None = None) -> str:
    """Size, speed and quality of an artefact, the best if None. Each sentence has one baseline."""
    artefact = artefact or report.best
    if artefact is None:
        return "Nothing was measured."
    speed, where, beside = [], "", DENSE
    if speedup := report.speedup("decode_speedup", artefact) or report.speedup("prefill_speedup", artefact):
        beside, times = report.baseline_of(speedup), f"{speedup.value:.2f}×"
        if (speedup.low or 0) > 1 or (speedup.high or 2) < 1:
            slower = ", which is slower" if (speedup.high or 2) < 1 else ""
            verb = "decodes" if speedup.figure == "decode_speedup" else "runs"
            speed = [f"{verb} {times} as fast{interval(speedup)}{slower}"]
        else:
            speed = [f"no clear speed difference ({times}{interval(speedup)})"]
        if machine := report.conditions.get("machine"):
            where = f"; on {machine}, {speedup.where.removeprefix(f'{artefact} in ')}"
    quality = []
    for name in report.metrics[:1]:
        for row in report.find(name, artefact):
            dense = "" if row.baseline is None else f"{amount(name, row.baseline)} → "
            quality.append(f"{name} {dense}{amount(name, row.value, row.error)}")
    of = "tokens" if "perplexity" in report.metrics else "predictions"
    for row in report.find("top1_agreement", artefact):
        quality.append(f"the same answer as dense in {100 * (row.value or 0):.0f} % of {of}")
    for row in report.find("task_recovery", artefact):
        quality.append(f"{amount('recovery', row.value)} the accuracy on tasks{interval(row)}")
    size = _size(report, artefact, beside)
    if beside == DENSE:
        return f"{artefact}: {', '.join(size + speed + quality)}{where}."
    others = ", ".join(_size(report, artefact, DENSE) + quality)
    return f"{artefact}: {', '.join(size + speed)}{where}. It has {others}."


def _size(report: RunReport, artefact: str, beside: str) -> list[str]:
    pairs = zip(report.find("bytes", artefact), report.find("bytes", beside), strict=False)
    named = "the dense model" if beside == DENSE else beside
    return [f"{amount('bytes_ratio', (own.value or 0) / (of.value or 1))} the bytes of {named}" for own, of in pairs]
