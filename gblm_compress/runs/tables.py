"""The tables of a report, for the terminal, Markdown and the page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gblm_compress.runs.rows import LESS_IS_BETTER, Row, amount, interval
from gblm_compress.runs.run_report import RunReport, clear

NAMES = {
    "cross_entropy": "cross-entropy",
    "mean_kl": "KL",
    "top1_agreement": "same top-1",
    "top10_agreement": "dense top 10 kept",
    "density": "nonzero",
    "bytes": "on disk",
    "bytes_ratio": "of dense",
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "decode_speedup": "decode",
    "prefill_speedup": "prefill",
    "output_error": "error",
}
"""The headings of figures; others have their own names."""
PLAIN = (
    ("Tasks", {"model": "artefact", "task": "part"}, ("questions", "accuracy", "dense_accuracy", "recovery")),
    ("Kernels that ran", {"model": "where", "kernel": "part"}, ("prefill_kernels", "decode_kernels")),
    ("Pruned layers", {"layer": "part"}, ("weights", "zeros", "output_error")),
    ("Recovery", {"tokens": "tokens", "weights": "part"}, ("held_out_loss",)),
)
"""The tables that only list rows: title, labels, figures."""
NOTES = {
    "Tasks": "± is one standard error; a recovery has its 95 % interval.",
    "Speed and memory": "Medians over the rounds. The speed-up is over dense in the same runtime and dtype; its "
    "interval is from the p10 and p90 of both.",
    "Kernels that ran": "Calls in one forward pass.",
    "Pruned layers": "The error of the layer's output, relative to the output of its dense weights.",
    "Recovery": "The divergence from dense.",
}
UNMEASURED = "–"
SMALL = 0.01
"""A figure without an interval counts as the same if it changes by no more than this fraction."""
MOST = 4  # figures in a note


@dataclass(frozen=True)
class Cell:
    """A text, the value to sort by (None sorts by the text), and its mark: "good", "bad" or nothing."""

    text: str
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table; `columns` is {heading: whether it holds numbers}."""

    title: str
    columns: dict[str, bool]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        unmeasured = any(cell.text == UNMEASURED for row in self.rows for cell in row)
        return (*self.notes, *([f"{UNMEASURED}: not measured."] if unmeasured else []))


def name_of(figure: str) -> str:
    return NAMES.get(figure, figure.replace("_", " "))


def cell_of(row: Row | None) -> Cell:
    if row is None:
        return Cell(UNMEASURED)
    ratio = row.figure.endswith(("speedup", "recovery"))
    mark = clear(row) if ratio else ""
    text = amount(row.figure, row.value, row.error).removesuffix(" ms")  # the heading has the unit
    return Cell(text + (interval(row) if ratio else ""), row.value, mark)


def of(report: RunReport) -> list[Table]:
    plain = (table(title, report.rows, labels, figures, NOTES[title]) for title, labels, figures in PLAIN)
    return [each for each in (gates(report), quality(report), speed(report), *plain, stages(report)) if each.rows]


def table(title: str, rows: Iterable[Row], labels: dict[str, str], figures: Sequence[str], *notes: str) -> Table:
    """A line for each combination of labels {heading: attribute of a row}, a column for each measured figure."""
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.figure in figures:
            lines.setdefault(tuple(getattr(row, label) for label in labels.values()), {})[row.figure] = row
    shown = [figure for figure in figures if any(figure in line for line in lines.values())]
    headings = [name_of(figure) + " ms" * figure.endswith("_ms") for figure in shown]
    columns = dict.fromkeys(labels, False) | dict.fromkeys(headings, True)
    cells = [[*map(_label, key), *(cell_of(line.get(figure)) for figure in shown)] for key, line in lines.items()]
    return Table(title, columns, cells, notes)


def _label(value: Any) -> Cell:
    return Cell(f"{value:,}", value) if isinstance(value, int) else Cell(str(value))


def gates(report: RunReport) -> Table:
    rows = []
    for gate in report.gates:
        figures = ((gate.limit, ""), (gate.measured, UNMEASURED), (gate.bound, ""))
        found = [Cell(none if value is None else amount(gate.gate[4:], value), value) for value, none in figures]
        holds = Cell("yes", 1, "good") if gate.passed else Cell("no", 0, "bad")
        rows.append([Cell(gate.gate), Cell(gate.subject), *found, holds])
    columns = {"gate": False, "of": False, "limit": True, "found": True, "worst": True, "holds": False}
    return Table("Gates", columns, rows)


def quality(report: RunReport) -> Table:
    metrics = report.metrics[:1]
    figures = [*metrics, *report.fidelity, "density", "bytes", "bytes_ratio"]
    errors = any(row.error is not None for name in metrics for row in report.find(name))
    notes = ["± is one standard error over the samples."] if errors else []
    if evaluated := report.conditions.get("evaluation"):
        notes.append(f"Evaluated on {evaluated}.")
    return table("Quality and size", report.rows, {"model": "artefact"}, figures, *notes)


def speed(report: RunReport) -> Table:
    timed = [row for row in report.rows if row.runtime and not row.part]
    dtypes = {row.dtype for row in timed}
    shown = ["tpot_ms", "tokens_per_second", "decode_speedup"] if report.generates else ["prefill_speedup"]
    labels = {"model": "artefact", "runtime": "runtime", "dtype": "dtype", "batch": "batch"}
    notes = [NOTES["Speed and memory"]]
    if len(dtypes) == 1:
        del labels["dtype"]
        notes.append(f"All are compared with dense {dtypes.pop()}.")
    names = {row.artefact for row in timed}
    if untimed := [row.artefact for row in report.find("bytes") if row.artefact not in names]:
        notes.append(f"Not timed: {', '.join(untimed)}.")
    found = table("Speed and memory", timed, labels, ["ttft_ms", *shown, "memory"], *notes)
    dense = {row.artefact for row in timed if row.dense}
    rows = [[*line[:-2], Cell("dense", 1.0), line[-1]] if line[0].text in dense else line for line in found.rows]
    return replace(found, rows=rows) if name_of(shown[-1]) in found.columns else found


def stages(report: RunReport) -> Table:
    rows = [
        [Cell(stage.name), Cell(f"{stage.seconds:.1f}", stage.seconds), Cell("reused" if stage.reused else "done")]
        for stage in report.stages
    ]
    return Table("Stages", {"stage": False, "seconds": True, "": False}, rows)


def changes(before: RunReport, now: RunReport) -> Table:
    """The changes between two runs, worse figures first; times within one runtime, dtype and batch."""
    earlier, later = _by_key(before), _by_key(now)
    lines = []
    for key, row in later.items():
        if (was := earlier.get(key)) and was.value is not None and row.value is not None:
            change, verdict = row.value / was.value - 1 if was.value else None, compared(was, row)
            rank, mark = {"worse": (0, "bad"), "better": (1, "good"), "same": (2, "")}[verdict]
            figures = [Cell(amount(row.figure, each.value), each.value) for each in (was, row)]
            percent = Cell("" if change is None else f"{100 * change:+.1f} %", change)
            lines.append([Cell(row.where), Cell(name_of(row.figure)), *figures, percent, Cell(verdict, rank, mark)])
    lines.sort(key=lambda line: line[-1].value or 0)
    columns = {"artefact": False, "figure": False, "before": True, "now": True, "change": True, "verdict": False}
    notes = ["Worse and better: the intervals of both runs do not overlap; without intervals, a change of more than "
             f"{100 * SMALL:.0f} %."]  # fmt: skip
    if gone := [f"{name_of(row.figure)} of {row.artefact}" for key, row in earlier.items() if key not in later]:
        more = f" and {len(gone) - MOST} more" if len(gone) > MOST else ""
        notes.append(f"Measured before, but not now or not in the same way: {', '.join(gone[:MOST])}{more}.")
    return Table("This run compared with the previous one", columns, lines, tuple(notes))


def compared(was: Row, now: Row) -> str:
    """Either "worse", "better" or "same"."""
    assert was.value is not None and now.value is not None
    if was.low is not None and was.high is not None and now.low is not None and now.high is not None:
        above, below = now.low > was.high, now.high < was.low
    else:
        change, same = now.value - was.value, SMALL * abs(was.value)
        above, below = change > same, change < -same
    if not above and not below:
        return "same"
    return "worse" if above == (now.figure in LESS_IS_BETTER) else "better"


def _by_key(report: RunReport) -> dict[tuple[Any, ...], Row]:
    """The rows by their key in two runs, without derived figures."""
    found = {}
    for row in report.rows:
        derived = row.figure in ("bytes_ratio", "retained", "density") or row.figure.endswith("_increase")
        if not row.part and row.tokens is None and not derived:
            stored = row.dtype and row.dtype.partition("/")[0]  # without the arithmetic's
            found[row.artefact, row.figure, row.runtime, stored, row.batch] = row
    return found
