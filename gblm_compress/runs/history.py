"""Several runs on one page: what each made of the model, and where the last one fell behind the one before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gblm_compress.errors import UsageError
from gblm_compress.runs import page, run_report, tables, vega
from gblm_compress.runs import report as documents
from gblm_compress.runs.figures import LESS_IS_BETTER, TIMED, Figure, is_derived
from gblm_compress.runs.run_report import RunReport, headline, when
from gblm_compress.runs.summary import ModelSummary
from gblm_compress.runs.tables import Cell, Table
from gblm_compress.runs.vega import Chart
from gblm_compress.storage import outputs, records

NAMES = {
    "cross_entropy": "cross-entropy",
    "spearman": "Spearman's correlation",
    "top1_accuracy": "top-1 accuracy",
    "top5_accuracy": "top-5 accuracy",
    "mean_kl": "KL divergence",
    "top1_agreement": "same top-1 as dense",
    "cosine": "cosine with dense",
    "top10_agreement": "dense top 10 kept",
    "bytes": "bytes on disk",
    "memory": "peak memory",
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "decode_speedup": "decode ×",
    "prefill_speedup": "prefill ×",
}
"""What a figure is called; one that is not here, by its own name."""

MOST = 4  # of what got worse, that the page says at its head
SMALL = 0.01
"""By how much a figure without an interval may change, as a fraction, and count as the same."""


@dataclass(frozen=True)
class ReportResult:
    """The reports of one or more runs on a page.

    Attributes:
        page: the file that was written.
        runs: the reports, the newest last.
        changes: from the run before the last one to the last one; None for a single run.
    """

    page: str
    runs: list[RunReport]
    changes: Table | None

    @property
    def regressions(self) -> list[str]:
        """What got worse, in words."""
        return regressions(self.changes) if self.changes else []

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"page": self.page, "runs": [run.as_dict() for run in self.runs], "regressions": self.regressions}


def report(folders: Sequence[Path], output: Path) -> ReportResult:
    """Write one page about runs; about a single run it is the run's own page.

    Args:
        folders: of the runs, the newest last.
        output: the page; one that this program wrote may be there.

    Raises:
        UsageError: no run is given, a folder holds no report, or another file is where the page would be.
        OutputError: the disk does not take the page.
    """
    outputs.check_document(output, documents.MARK)
    if not folders:
        raise UsageError("no run is given; give the folders that `gblm-compress run` wrote, the newest last")
    reports = [run_report.read(folder) for folder in folders]
    several = len(reports) > 1
    records.write_text(output, html(reports) if several else documents.html(reports[0]))
    return ReportResult(str(output), reports, changes(*reports[-2:]) if several else None)


def changes(before: RunReport, now: RunReport) -> Table:
    """What changed between two runs, for every figure that both have; what got worse comes first.

    Figures that are no timings are compared whatever runtime, dtype and batch each run timed.
    """
    earlier, later = _by_key(before), _by_key(now)
    rows = []
    for key, (row, figure) in later.items():
        if key in earlier:
            name, was = key.figure, earlier[key][1]
            verdict = compared(name, was, figure)
            change = figure.value / was.value - 1 if was.value else 0.0
            rows.append(
                [
                    Cell(row.model),
                    Cell(row.where if key.timed else row.runtime),
                    Cell(key.words),
                    _cell(name, was),
                    _cell(name, figure),
                    Cell(f"{100 * change:+.1f} %", change),
                    Cell(verdict, ORDER[verdict], {"worse": "bad", "better": "good"}.get(verdict, "")),
                ]
            )
    rows.sort(key=lambda row: row[-1].value or 0)
    columns = {"model": False, "runtime": False, "figure": False, "before": True, "now": True, "change": True}
    notes = [
        "Worse or better is what the intervals of both runs leave no doubt about; without an interval, what changed by "
        f"more than {100 * SMALL:.0f} %."
    ]
    if gone := [f"{key.words} of {row.model}" for key, (row, _) in earlier.items() if key not in later]:
        more = f" and {len(gone) - MOST} more" if len(gone) > MOST else ""
        notes.append(f"Measured before and not now, or not in the same way: {', '.join(gone[:MOST])}{more}.")
    return Table("This run against the one before", columns | {"verdict": False}, rows, tuple(notes))


ORDER = {"worse": 0, "better": 1, "same": 2}


def compared(name: str, was: Figure, now: Figure) -> str:
    """ "worse", "better" or "same"."""
    sign = 1 if name in LESS_IS_BETTER else -1
    if was.low is not None and was.high is not None and now.low is not None and now.high is not None:
        above, below = now.low > was.high, now.high < was.low
    else:
        change, same = now.value - was.value, SMALL * abs(was.value)
        above, below = change > same, change < -same
    if not above and not below:
        return "same"
    return "worse" if above == (sign > 0) else "better"


def regressions(table: Table) -> list[str]:
    """What got worse, in words."""
    return [f"{row[0].text} in {row[1].text}: {row[2].text} {row[3].text} → {row[4].text}" for row in table.rows
            if row[-1].text == "worse"]  # fmt: skip


def runs(reports: Sequence[RunReport]) -> Table:
    """One row for each run."""
    rows = []
    for report in reports:
        failed = len(report.failed_gates)
        state = (
            Cell("no gates") if not report.gates else Cell("PASS", 1, "good") if not failed else Cell("FAIL", 0, "bad")
        )
        rows.append([Cell(_name(report)), Cell(when(report)), state, Cell(headline(report))])
    return Table("Runs", {"run": False, "finished": False, "gates": False, "in short": False}, rows)


def html(reports: Sequence[RunReport]) -> str:
    """The page of several runs, the last of which is held against the one before it."""
    before, now = reports[-2:]
    table = changes(before, now)
    worse = regressions(table)
    conditions = dict(now.conditions)
    for name, value in before.conditions.items():
        if conditions.get(name) != value:
            conditions[f"{name}, before"] = value
    charts: list[Chart] = [chart for name in ("perplexity", "tpot_ms", "bytes") if (chart := trend(reports, name))]
    return page.render(
        title=f"{len(reports)} runs of {now.model}",
        verdict=None,
        headline=[headline(now), _in_words(worse)],
        subtitle=f"the last run, {_name(now)}, against {_name(before)}",
        charts=charts,
        tables=[table, runs(reports), *tables.of(now)],
        conditions=conditions,
        commands=now.commands,
        recipe=now.recipe,
    )


def trend(reports: Sequence[RunReport], name: str) -> Chart | None:
    """One figure of every artefact over several runs, in their order."""
    values = [
        {
            "run": i,
            "row": vega.label(row),
            "kind": vega.label(row),
            **vega.ends(found[name]),
            "finished": report.finished,
        }
        for i, report in enumerate(reports, 1)
        for row in report.rows
        for found in [report.figures(row)]
        if name in found
    ]
    if not values:
        return None
    words = {"perplexity": "perplexity", "tpot_ms": "ms per token", "bytes": "bytes on disk"}
    x = {"field": "run", "type": "ordinal", "title": "run", "axis": {"labelAngle": 0}}
    y = {"type": "quantitative", "title": words[name], "scale": {"zero": False}}
    if name == "bytes":
        y["axis"] = {"format": ".2s"}
    colour = vega.colour(values) | {"legend": {"orient": "bottom", "columns": 1, "labelLimit": 300}}
    shared = {
        "x": x,
        "color": colour,
        "tooltip": [{"field": "finished"}, *vega.tooltip("row", "middle", "low", "high")],
    }
    return Chart(
        f"trend-{name}".replace("_", "-"),
        f"{words[name].capitalize()} over the runs",
        "Runs in the order in which they were given. A line upright at a dot is its interval.",
        {
            "data": {"values": values},
            "height": 240,
            "layer": [
                {"mark": "rule", "encoding": shared | {"y": y | {"field": "low"}, "y2": {"field": "high"}}},
                {
                    "mark": {"type": "line", "point": {"filled": True}},
                    "encoding": shared | {"y": y | {"field": "middle"}},
                },
            ],
        },
    )


def _in_words(worse: list[str]) -> str:
    if not worse:
        return "Nothing got worse."
    more = f"; and {len(worse) - MOST} more" if len(worse) > MOST else ""
    return f"Worse than before: {'; '.join(worse[:MOST])}{more}."


def _name(report: RunReport) -> str:
    return Path(report.output).name


@dataclass(frozen=True)
class _Key:
    """What a figure of two runs must have in common to be compared.

    Attributes:
        timed: runtime, dtype and batch of a timing; nothing of other figures.
    """

    model: str
    figure: str
    timed: tuple[object, ...]

    @property
    def words(self) -> str:
        """The figure, as the table calls it."""
        return NAMES.get(self.figure, self.figure.replace("_", " "))


def _by_key(report: RunReport) -> dict[_Key, tuple[ModelSummary, Figure]]:
    """All figures of a run but those that follow from others, each with a row that has it."""
    found: dict[_Key, tuple[ModelSummary, Figure]] = {}
    for row in report.rows:
        for name, figure in report.figures(row).items():
            if not is_derived(name):
                stored = row.dtype and row.dtype.partition("/")[0]  # without that of the arithmetic
                timed = (row.runtime, stored, row.batch) if name in TIMED else ()
                found.setdefault(_Key(row.model, name, timed), (row, figure))
    return found


def _cell(name: str, figure: Figure) -> Cell:
    unit = "bytes" if name in ("bytes", "memory") else "%" if name.endswith(("agreement", "accuracy")) else ""
    return Cell(tables.with_unit(figure.value, unit), figure.value)
