"""The report of a run, as in `report.json`; pages, tables and charts are made from it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gblm_compress.errors import UsageError, first_line
from gblm_compress.measure.timings import NO_SPEED_UP
from gblm_compress.runs.rows import DENSE, LESS_IS_BETTER, SIZE, GateOutcome, Row, amount, interval, unit_of
from gblm_compress.storage import records

REPORT = "report.json"


@dataclass(frozen=True)
class Outcome:
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

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.as_dict() for row in self.rows], "passed": self.passed}


def read(folder: Path) -> RunReport:
    """The report of a run, from its folder or its `report.json`."""
    path = folder / REPORT if folder.is_dir() else folder
    try:
        return TypeAdapter(RunReport).validate_python(records.read_json(path))
    except OSError as error:
        raise UsageError(
            f"{str(folder)!r} holds no report of a run ({error.strerror or error}); give the folder that "
            "`gblm-compress run` wrote"
        ) from error
    except ValueError as error:  # pydantic's ValidationError is one
        fault = error.errors()[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault else first_line(error)
        raise UsageError(
            f"{str(path)!r} is not a report that this version reads ({said}); run the recipe again: "
            "the stages of other versions are repeated"
        ) from error


@dataclass(frozen=True)
class Tile:
    name: str  # "Size", "Speed" or "Quality"
    figure: str  # the difference from the dense artefact `beside`, in words
    detail: str = ""  # the values behind it, if measured
    mark: str = ""  # "good", "bad" or nothing
    beside: str = DENSE

    @property
    def sentence(self) -> str:
        return f"{self.figure} ({self.detail})" if self.detail else self.figure


@dataclass(frozen=True)
class Verdict:
    """Size, speed and quality of an artefact, compared with a dense one in the same format."""

    artefact: str
    beside: str  # the dense artefact that it was timed against; the dense model if there is none
    tiles: list[Tile]
    where: str  # the machine and runtime of the speed-up
    others: list[str]  # figures that are compared with the dense model only

    def sentence(self, *, details: bool = True) -> str:
        """One sentence for each dense artefact that it is compared with."""
        said: dict[str, list[str]] = {self.beside: [], DENSE: []}
        for tile in self.tiles:
            said[tile.beside].append(tile.sentence if details else tile.figure)
        said[DENSE] += self.others
        known = f"{', '.join(said.pop(self.beside))}: {self.artefact} compared with {named(self.beside)}{self.where}."
        return f"{known} Compared with the dense model: {', '.join(said[DENSE])}." if said.get(DENSE) else known


def named(artefact: str) -> str:
    return "the dense model" if artefact == DENSE else artefact


def headline(report: RunReport, artefact: str | None = None) -> str:
    """The verdict on an artefact, the best if None, in words."""
    found = verdict(report, artefact)
    return found.sentence() if found else "Nothing was measured."


def verdict(report: RunReport, artefact: str | None = None) -> Verdict | None:
    artefact = artefact or report.best
    if artefact is None:
        return None
    speedup = report.speedup("decode_speedup", artefact) or report.speedup("prefill_speedup", artefact)
    beside, where = DENSE, ""
    if speedup:
        timed = (row.artefact for row in report.rows if row.dense and row.runtime and row.lane == speedup.lane)
        beside = next(timed, DENSE)
        if machine := report.conditions.get("machine"):
            where = f", on {machine}, {speedup.where.removeprefix(f'{artefact} in ')}"
    others = [] if beside == DENSE else [_size(report, artefact, DENSE).sentence]
    of = "tokens" if "perplexity" in report.metrics else "predictions"
    for row in report.find("top1_agreement", artefact):
        others.append(f"the same answer in {100 * (row.value or 0):.0f} % of {of}")
    for row in report.find("task_recovery", artefact):
        others.append(f"{amount('recovery', row.value)} the accuracy on tasks{interval(row)}")
    tiles = [_size(report, artefact, beside), _speed(report, speedup, beside), _quality(report, artefact, beside)]
    return Verdict(artefact, beside, tiles, where, others)


def _size(report: RunReport, artefact: str, beside: str) -> Tile:
    own, dense = (next((row.value for row in report.find("bytes", name)), None) for name in (artefact, beside))
    if not own or not dense:
        return Tile("Size", "size not measured", beside=beside)
    change, detail = 100 * (own / dense - 1), f"{amount('bytes', dense)} → {amount('bytes', own)}"
    if abs(change) < 0.5:
        return Tile("Size", "same size", detail, beside=beside)
    word, mark = ("smaller", "good") if change < 0 else ("larger", "bad")
    return Tile("Size", f"{abs(change):.0f} % {word}", detail, mark, beside)


def _speed(report: RunReport, speedup: Row | None, beside: str) -> Tile:
    if speedup is None:
        return Tile("Speed", "speed not measured", beside=beside)
    time, what = ("tpot_ms", "token") if speedup.figure == "decode_speedup" else ("ttft_ms", "forward pass")
    pair = [row for name in (beside, speedup.artefact) for row in report.find(time, name) if row.lane == speedup.lane]
    detail = [] if speedup.low is None or speedup.high is None else [f"{speedup.low:.2f}× to {speedup.high:.2f}×"]
    if len(pair) == 2:
        detail.append(f"{pair[0].value:.2f} → {pair[1].value:.2f} ms per {what}")
    mark, figure = clear(speedup), f"{speedup.value:.2f}× as fast"
    if not mark:
        figure, detail = NO_SPEED_UP, [f"{speedup.value:.2f}×", *detail]
    prompts = [row for row in report.find("prefill_speedup", speedup.artefact) if row.lane == speedup.lane]
    for row in prompts if speedup.figure == "decode_speedup" else []:
        detail.append(f"prompts {row.value:.2f}× as fast" if clear(row) else "prompts without a clear difference")
    return Tile("Speed", figure, ", ".join(detail), mark, beside)


def clear(speedup: Row) -> str:
    """Whether the interval leaves no doubt: "good" or "bad", else nothing."""
    return "good" if (speedup.low or 0) > 1 else "bad" if (speedup.high or 2) < 1 else ""


def _quality(report: RunReport, artefact: str, beside: str) -> Tile:
    """Compared with the dense model itself if the dense export was not evaluated."""
    name = next(iter(report.metrics), "")
    own = next((row for row in report.rows if row.figure == name and row.artefact == artefact), None)
    dense = next((row.value for row in report.find(name, beside)), None)
    if own is None:
        return Tile("Quality", "quality not measured", beside=beside)
    if dense is None:
        dense, beside = own.baseline, DENSE
    words = name.replace("_", " ")
    if own.value is None:
        return Tile("Quality", f"{words} not finite", "", "bad", beside)
    if not dense:
        return Tile("Quality", f"{words} {amount(name, own.value, own.error)}", beside=beside)
    points = unit_of(name) == "%"
    change = 100 * (own.value - dense if points else (own.value - dense) / abs(dense))
    shown = f"{change:+.1f}" if abs(change) < 10 else f"{change:+.0f}"
    figure = f"{words} {shown.replace('-', '−')} {'points' if points else '%'}"
    if float(shown) == 0:
        figure = f"same {words}"
    worse = (change > 0) == (name in LESS_IS_BETTER)
    mark = "" if abs(change) < 1 else "bad" if worse else "good"
    return Tile("Quality", figure, f"{amount(name, dense)} → {amount(name, own.value, own.error)}", mark, beside)
