"""The report of a run as files: JSON, a web page, pictures, Markdown and JUnit."""

import base64
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from gblm_compress.errors import UsageError
from gblm_compress.printing import printable, printable_lines
from gblm_compress.runs import charts, run_report, tables
from gblm_compress.runs.run_report import REPORT, RunReport, headline, verdict
from gblm_compress.storage import outputs, records

FILES = Path(__file__).parent / "page_files"
PAGE, PICTURES = "report.html", "charts"
SHORT = ("Gates", "Quality and size", "Speed and memory", "Tasks")
"""The tables of a summary in a terminal or in Markdown, and of a model card."""


@dataclass(frozen=True)
class ReportResult:
    """The page's file, the reports (newest last) and their differences."""

    page: str
    runs: list[RunReport]
    changes: tables.Table | None

    @property
    def regressions(self) -> list[str]:
        worse = [row for row in self.changes.rows if row[-1].text == "worse"] if self.changes else []
        return [f"{where.text}: {name.text} {before.text} → {now.text}" for where, name, before, now, *_ in worse]

    def as_dict(self) -> dict[str, Any]:
        return {"page": self.page, "runs": [run.as_dict() for run in self.runs], "regressions": self.regressions}


def report(folders: Sequence[Path], output: Path) -> ReportResult:
    """Write the page of the last run; with two runs, it has their differences."""
    with outputs.PAGE.reserved(output) as write:
        if len(folders) not in (1, 2):
            raise UsageError("give one folder that `gblm-compress run` wrote, or two to compare them, the newest last")
        runs = [run_report.read(folder) for folder in folders]
        changed = tables.changes(*runs) if len(runs) == 2 else None
        write(html(runs[-1], changed))
        return ReportResult(str(output), runs, changed)


def write(report: RunReport, output: Path) -> None:
    """Write `report.json`, then draw the charts for the page and as pictures."""
    records.write_file(output / REPORT, records.as_json(report.as_dict()))
    drawn = charts.of(report)
    records.write_file(output / PAGE, html(report, drawn=drawn))
    with suppress(OSError):  # without the folder, writing into it fails below
        (output / PICTURES).mkdir(exist_ok=True)
    for chart in drawn:
        records.write_file(output / PICTURES / f"{chart.name}.png", chart.picture)


def html(report: RunReport, changed: tables.Table | None = None, drawn: Sequence[charts.Chart] | None = None) -> str:
    """The page of a run in one file. `changed` is the table of changes since another run."""
    shown, finished = charts.of(report) if drawn is None else drawn, report.finished[:16].replace("T", " ")
    environment = Environment(autoescape=True, finalize=_printable, loader=FileSystemLoader(FILES))
    return environment.get_template("page.html").render(
        title=f"{report.model}: {report.method}",
        word=pass_or_fail(report),
        verdict=verdict(report),
        subtitle=f"gblm-compress {report.environment.get('gblm_compress', '')}, finished {finished} UTC",
        charts=[(chart, base64.b64encode(chart.picture).decode()) for chart in shown],
        tables=[*([changed] if changed else []), *tables.of(report)],
        named=run_report.named,
        conditions=report.conditions,
        commands=report.commands,
        recipe=json.dumps(report.recipe, indent=2),
        css=Markup((FILES / "page.css").read_text()),
        js=Markup((FILES / "page.js").read_text()),
    )


def _printable(value: Any) -> Any:
    """Names may have bytes that are not UTF-8."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable_lines(value)


def pass_or_fail(report: RunReport) -> str | None:
    return ("PASS" if report.passed else "FAIL") if report.gates else None


def markdown(report: RunReport) -> str:
    word = pass_or_fail(report)
    lines = [f"## {f'{word}: ' if word else ''}{plain(report.model)}: {plain(report.method)}", ""]
    lines += [plain(headline(report)), ""]
    if failed := report.failed_gates:
        lines += ["Failed gates:", "", *(f"- {plain(gate.sentence)}" for gate in failed), ""]
    return outputs.SUMMARY.header + "\n".join([*lines, *markdown_tables(report), ""])


def markdown_tables(report: RunReport) -> list[str]:
    """The `SHORT` tables and the conditions, as lines."""
    lines = []
    for each in tables.of(report):
        if each.title in SHORT:
            lines += [f"### {each.title}", "", "| " + " | ".join(each.columns) + " |"]
            lines.append("| " + " | ".join("---:" if number else "---" for number in each.columns.values()) + " |")
            lines += ["| " + " | ".join(plain(cell.text) for cell in row) + " |" for row in each.rows]
            lines += ["", *(f"{plain(note)}\n" for note in each.all_notes)]
    return [*lines, *(f"- {plain(name)}: {plain(value)}" for name, value in report.conditions.items())]


def plain(text: str) -> str:
    """Text from outside for Markdown: one line without markup or HTML."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]|#" else c for c in printable(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def junit(report: RunReport) -> str:
    suite = ElementTree.Element(
        "testsuite",
        name=f"gblm-compress: {printable(report.model)}",
        tests=str(len(report.gates)),
        failures=str(len(report.failed_gates)),
        errors="0",
        time=f"{sum(stage.seconds for stage in report.stages if not stage.reused):.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in report.conditions.items():
        ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    for gate in report.gates:
        case = ElementTree.SubElement(suite, "testcase", classname=gate.gate, name=printable(gate.subject))
        if not gate.passed:
            ElementTree.SubElement(case, "failure", message=printable(gate.sentence))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
