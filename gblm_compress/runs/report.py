"""The report of a run as files, all made from one `RunReport`: JSON, a web page, pictures, Markdown and JUnit."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gblm_compress.printing import printable
from gblm_compress.runs import charts, images, page, tables
from gblm_compress.runs.run_report import REPORT, RunReport, headline, when
from gblm_compress.runs.tables import Table
from gblm_compress.storage import records

MARK = "gblm-compress"
"""What every document that is written here has among its first characters."""
PAGE, PICTURES = "report.html", "charts"
SHORT = ("Gates", "Quality and size", "Speed and memory", "Tasks", "Methods")
"""The tables of a summary, in a terminal or in Markdown."""


def write(report: RunReport, output: Path) -> None:
    """Write `report.json`, the page, and the charts as pictures.

    Raises:
        OutputError: the disk does not take them.
    """
    records.write_text(output / REPORT, records.as_json(report.as_dict()))
    records.write_text(output / PAGE, html(report))
    images.write(charts.of(report), output / PICTURES)


def html(report: RunReport) -> str:
    """The page of one run."""
    return page.render(
        title=f"{report.model}: {report.method}",
        verdict=verdict(report),
        headline=[headline(report)],
        subtitle=f"gblm-compress {report.environment.get('gblm_compress', '')}, finished {when(report)}",
        charts=charts.of(report),
        tables=tables.of(report),
        conditions=report.conditions,
        commands=report.commands,
        recipe=report.recipe,
    )


def verdict(report: RunReport) -> str | None:
    """Whether every gate holds, in a word; None without gates."""
    return ("PASS" if report.passed else "FAIL") if report.gates else None


def markdown(report: RunReport) -> str:
    """A summary for a job's page: the verdict, the headline, the tables, and the names of the gates that failed."""
    word = verdict(report)
    lines = [f"<!-- {MARK} -->", f"## {f'{word}: ' if word else ''}{plain(report.model)}: {plain(report.method)}", ""]
    lines += [plain(headline(report)), ""]
    if failed := report.failed_gates:
        lines += ["Failed gates:", "", *(f"- {plain(sentence(gate))}" for gate in failed), ""]
    for table in tables.of(report):
        if table.title in SHORT:
            lines += markdown_table(table)
    lines += [*(f"- {plain(name)}: {plain(value)}" for name, value in report.conditions.items()), ""]
    return "\n".join(lines)


def junit(report: RunReport) -> str:
    """The gates as test cases, for the test pages of CI systems."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"{MARK}: {printable(report.model)}",
        tests=str(len(report.gates)),
        failures=str(len(report.failed_gates)),
        errors="0",
        time=f"{sum(stage.seconds for stage in report.stages if not stage.reused):.3f}",
    )
    for gate in report.gates:
        case = ElementTree.SubElement(suite, "testcase", classname=gate.gate, name=printable(gate.subject))
        if not gate.passed:
            ElementTree.SubElement(case, "failure", message=printable(sentence(gate)))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def sentence(gate: Any) -> str:
    """An outcome in words: the gate, what it is on, what was measured, and the limit."""
    unit = tables.unit_of(gate.gate)
    limit = f"{'at least' if gate.gate.startswith('min_') else 'at most'} {tables.with_unit(gate.limit, unit)}"
    if gate.measured is None:
        return f"{gate.gate} on {gate.subject}; {limit} is needed"
    end = f" (worse end {tables.with_unit(gate.bound, unit)})" if gate.bound is not None else ""
    return f"{gate.gate} on {gate.subject}: {tables.with_unit(gate.measured, unit)}{end}; {limit} is needed"


def markdown_table(table: Table) -> list[str]:
    """A table under its title, as lines."""
    lines = [f"### {table.title}", "", "| " + " | ".join(table.columns) + " |"]
    lines.append("| " + " | ".join("---:" if number else "---" for number in table.columns.values()) + " |")
    lines += ["| " + " | ".join(plain(cell.text) for cell in row) + " |" for row in table.rows]
    return [*lines, "", *(f"{note}\n" for note in table.all_notes)]


def plain(text: str) -> str:
    """Text from outside as Markdown shows it: one line, neither markup nor HTML."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]|#" else c for c in printable(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
