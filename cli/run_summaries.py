"""What the commands on whole runs say at their end."""

from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.text import Text

from gblm_compress.cli import layout
from gblm_compress.printing import printable


def dry_run(content: dict[str, Any]) -> list[Any]:
    table = layout.plain("", "stage", "what would happen")
    table.add_column("disk, at most", justify="right")
    table.add_column("last time", justify="right")
    for i, step in enumerate(content["steps"], 1):
        reused, disk = step["fate"] == "reuse", step["disk"]
        stays, seconds = (disk and disk["stays"]), step["seconds"]
        cells = ("" if reused or not stays else decimal(stays), "" if seconds is None else f"{seconds:.0f} s")
        table.add_row(str(i), step["does"], step["fate"], *cells)
    limits = ", ".join(f"{name} {value}" for group in content["gates"] for name, value in group.items())
    return [
        table,
        *([f"gates to check: {limits}"] if limits else []),
        _disk(content["bytes"], content["free_bytes"]),
        _time(content["seconds"]),
        f"output: {content['output']}",
        *unchecked(content["unchecked"]),
    ]


def _disk(needed: int | None, free: int) -> str:
    if needed is None:
        return f"disk: not known until the model is on this machine; {decimal(free)} are free"
    return f"disk: at most {decimal(needed)}, temporary files included; {decimal(free)} are free"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "time: not known; some of these stages have not been done in this folder yet"
    return f"time: {seconds:.0f} s when these stages were last done in this folder"


def unchecked(names: list[str]) -> list[str]:
    """What a look at a recipe left out."""
    return [f"not looked at before the run, as it is not on this machine yet: {name}" for name in names]


def run(result: Any) -> list[Any]:
    from gblm_compress.runs import report
    from gblm_compress.runs.run_report import REPORT, headline
    from gblm_compress.runs.tables import of

    verdict, output = report.verdict(result), Path(result.output)
    parts: list[Any] = [part for table in of(result) if table.title in report.SHORT for part in layout.titled(table)]
    reused = [stage.name for stage in result.stages if stage.reused]
    if reused:
        parts.append("reused: " + ", ".join(reused))
    if warning := result.conditions.get("warning"):
        parts.append(f"warning: {warning}")
    parts += [f"artefacts: {output}", f"report: {output / report.PAGE} (and {REPORT}, {report.PICTURES}/)"]
    sentence = headline(result)
    colour = "bold red" if verdict == "FAIL" else "bold"
    return [*parts, "", Text.assemble((f"{verdict}: " if verdict else "", colour), printable(sentence))]


def report(result: Any) -> list[Any]:
    from gblm_compress.runs.history import runs

    changes = layout.titled(result.changes) if result.changes else []
    return [*layout.titled(runs(result.runs)), *changes, f"page: {result.page}"]


def push(content: dict[str, Any]) -> list[Any]:
    said = f"pushed to {content['pushed_to']}" if content["pushed_to"] else "not pushed; give --push-to-hub OWNER/NAME"
    return [*content["card"].splitlines(), f"files: {', '.join(content['files'])}", said]
