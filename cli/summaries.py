"""What each command prints at its end: tables that fit the terminal, sentences, and the command that comes next."""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gblm_compress.machine import noisy
from gblm_compress.printing import PlainConsole, printable
from gblm_compress.storage import records

WIDTH_OF_FILES = 160  # columns, where the output is no terminal and has no width of its own
COLOURS = {"good": "green", "bad": "bold red", "": ""}
PRODUCT = re.compile("MatMul|Gemm|Linear")


def show(command: str, result: Any, as_json: bool) -> None:
    """Print a result: one JSON document, or a summary for people."""
    if as_json or command == "schema":
        print(records.as_json(_plain(result)), end="")
        return
    console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=WIDTH_OF_FILES)
    for part in parts(command, result):
        print_part(part, console)


def parts(command: str, result: Any) -> list[Any]:
    """The tables and sentences that sum up a result."""
    return SUMMARIES[command](result if command in OF_RUNS else _plain(result))


def _plain(result: Any) -> Any:
    return result.as_dict() if hasattr(result, "as_dict") else result


def print_part(part: Table | Text | str, console: PlainConsole) -> None:
    """Print a table or a sentence. A table that is wider than the console is stacked: a line for each row, and below
    it every other cell with its heading."""
    if not isinstance(part, Table):
        console.say(part)
    elif console.measure(part, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(part)
    else:
        for sentence in _stacked(part):
            console.say(sentence)


def _stacked(table: Table) -> Iterator[Text]:
    if table.title:
        yield Text.assemble(table.title)
    headings = [str(column.header) for column in table.columns[1:]]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        yield Text.assemble(_text(first), style="bold")
        facts = [Text.assemble(f"{name} ", _text(cell)) for name, cell in zip(headings, others, strict=True) if cell]
        yield Text("  ") + Text(", ").join(facts)


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(str(cell)))


def table(headings: Iterable[str], rows: Iterable[Iterable[Any]], **options: Any) -> Table:
    """A table with a line below its headings, which begin with > where they are of numbers."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **options)
    for heading in headings:
        made.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    return made


def _pairs(pairs: dict[str, str | None]) -> Table:
    """Facts under one another; those without a value are left out."""
    return table(("", ""), ((name, value) for name, value in pairs.items() if value), show_header=False)


def titled(content: Any) -> list[Any]:
    """A table of a report under its title, with its notes."""
    headings = [f">{name}" if number else name for name, number in content.columns.items()]
    rows = [[Text(printable(cell.text), style=COLOURS[cell.mark]) for cell in row] for row in content.rows]
    title = Text(content.title, style="bold")
    return [table(headings, rows, title=title, title_justify="left"), *content.all_notes]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cost(c: dict[str, Any]) -> dict[str, str | None]:
    return {"time": _duration(c["seconds"]), "peak memory": decimal(c["peak_memory_bytes"]), "written to": c["folder"]}


def prune(c: dict[str, Any]) -> list[Any]:
    from gblm_compress.models.manifest import reasons

    share, zeros = c["weights"] / c["linear_weights"], 1 - c["nonzeros"] / c["weights"]
    patterns = ", ".join(sorted({layer["pattern"] for layer in c["layers"].values()}))
    facts = {
        "pruned layers": f"{len(c['layers'])}, with {100 * share:.1f} % of all linear weights",
        "pattern": f"{patterns}, verified on disk",
        "zeros": f"{c['weights'] - c['nonzeros']:,} of {c['weights']:,} ({100 * zeros:.2f} %)",
        "grid": c["grid"] and f"{c['grid']}; verified on disk",
        "left dense": reasons(c["left_dense"]),
    }
    notes = [f"note: {warning}" for warning in c["warnings"]]
    return [_pairs(facts | _cost(c)), *notes, f"next: gblm-compress evaluate {c['folder']} --baseline MODEL"]


def advise(c: dict[str, Any]) -> list[Any]:
    rows = [
        (p["name"], decimal(p["bytes"]), f"{p['ms_per_token']:.1f}", f"{p['low']:.1f}–{p['high']:.1f}")
        for p in c["predictions"]
    ]
    memory, disk = decimal(c["pruning_memory_bytes"]), decimal(c["pruning_disk_bytes"])
    return [
        table(("way", ">weights", ">ms per token", ">from–to"), rows),
        *c["sentences"],
        f"Pruning so would take about {_duration(c['pruning_seconds'])}, {memory} of memory, {disk} of disk.",
        *(f"note: {way} cannot be had: {reason}" for way, reason in c["left_out"].items()),
    ]


def generate(c: dict[str, Any]) -> list[Any]:
    facts: dict[str, str | None] = {
        "texts": f"{c['texts']:,}, of {c['words']:,} words",
        "tokens": f"{c['tokens']:,}, in {c['dtype']}, {c['tokens'] / c['seconds']:,.0f} tokens/s",
    }
    cost = _cost(c | {"folder": c["file"]})
    return [_pairs(facts | cost), f"next: gblm-compress prune MODEL -o pruned --calibration {c['file']}"]


def recover(c: dict[str, Any]) -> list[Any]:
    rows = []
    for number, look in enumerate(c["curve"]):
        loss, best = look["loss"], " *" if number == c["best"] else ""
        cells = "" if loss is None else f"{loss:.4f}", f"{look['held_out']:.4f}{best}", f"{100 * look['moved']:.1f} %"
        rows.append((f"{look['tokens']:,}", *cells))
    facts: dict[str, str | None] = {
        "held-out loss": f"{c['before']:.4f} before, {c['after']:.4f} after, nats per token",
        "kept": f"the weights after {c['curve'][c['best']]['tokens']:,} tokens (*)",
        "trained": f"{c['trained']:,} weights; the pattern is verified on disk",
        "text": f"each window read {c['passes']:.1f} times on average",
        **{f"overlap with {name}": f"{100 * share:.2f} %" for name, share in c["overlap"].items()},
    }
    curve = table((">tokens", ">training loss", ">loss, held out", ">mask moved"), rows)
    return [curve, _pairs(facts | _cost(c)), f"next: gblm-compress evaluate {c['folder']} --baseline MODEL"]


def export(c: dict[str, Any]) -> list[Any]:
    checks = {
        name.replace("_", " "): f"{value:.3g}" if isinstance(value, float) else str(value)
        for name, value in c["checks"].items()
    }
    facts = {
        "format": c["format"],
        "size": f"{decimal(c['bytes'])} (source {decimal(c['source_bytes'])})",
        **checks,
        "time": _duration(c["seconds"]),
        "written to": c["folder"],
    }
    return [_pairs(facts), f"next: gblm-compress benchmark {c['folder']} --baseline MODEL"]


def evaluate(c: dict[str, Any]) -> list[Any]:
    facts: dict[str, str | None] = {}
    for metric in c["metrics"][:1]:
        facts[metric] = _with_error(c[metric], c[f"{metric}_error"], 3)
        facts[f"{metric}, dense"] = f"{c[f'baseline_{metric}']:.3f}" if c["fidelity"] is not None else None
    for name, value in (c["fidelity"] or {}).items():
        if name == "mean_kl":
            per = "token" if c["sample"] == "window" else c["sample"]
            facts["mean KL from dense"] = f"{value:z.4f} nats per {per}"
        elif name in ("top1_agreement", "top10_agreement"):
            facts["dense top 10 kept" if "10" in name else "top-1 agreement"] = f"{100 * value:.2f} %"
        else:
            facts[f"{name.replace('_', ' ')} with dense"] = f"{value:.4f}"
    length = f" of {c['sequence_length']} tokens" if c["sample"] == "window" else ""
    facts["data"] = f"{c['dataset']}: {c['windows']} {c['sample']}{'s' * (c['windows'] != 1)}{length}"
    facts["computed in"] = f"{c['dtype']} on {c['provider']}"
    return [_pairs(facts), *([_tasks(c["zero_shot"])] if c["zero_shot"] else [])]


def _tasks(zero_shot: dict[str, Any]) -> Table:
    def ratio(found: dict[str, float] | None) -> str:
        return "" if found is None else f"{found['ratio']:.3f} ({found['low']:.3f}–{found['high']:.3f})"

    rows = []
    for t in zero_shot["tasks"]:
        dense = "" if t["dense_accuracy"] is None else f"{t['dense_accuracy']:.3f}"
        accuracy = _with_error(t["accuracy"], t["error"], 3)
        rows.append((t["task"], t["metric"], t["questions"], accuracy, dense, ratio(t["recovery"])))
    rows.append(("mean", "", "", f"{zero_shot['mean_accuracy']:.3f}", "", ratio(zero_shot["recovery"])))
    return table(("task", "metric", ">questions", ">accuracy", ">dense", ">recovery (95 %)"), rows)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def compare(c: dict[str, Any]) -> list[Any]:
    numbers = (">seeds", ">perplexity", ">KL from dense", ">accuracy", ">recovery", ">time", ">peak memory")
    rows = [
        (
            m["method"],
            m["pattern"],
            m["seeds"],
            _with_error(m["perplexity"], m["perplexity_error"], 2),
            _with_error(m["mean_kl"], m["mean_kl_error"], 3),
            *("" if m[name] is None else f"{m[name]:.3f}" for name in ("accuracy", "recovery")),
            f"{m['seconds']:.0f} s",
            decimal(m["peak_memory_bytes"]),
        )
        for m in c["rows"]
    ]
    found = table(("method", "pattern", *numbers), rows)
    return [found, f"dense: perplexity {c['dense_perplexity']:.2f}", f"plot: {c['plot']}"]


def benchmark(c: dict[str, Any]) -> list[Any]:
    generates = any(m["tpot_ms"] for m in c["measurements"])
    times = (">TTFT ms (p10–p90)", ">TPOT ms (p10–p90)", ">tokens/s") if generates else (">ms (p10–p90)", ">samples/s")
    speedups = {"prefill_speedup": "prefill", "decode_speedup": "decode"}
    speedups = speedups if generates else {"prefill_speedup": "against dense"}

    def spread(found: dict[str, float]) -> str:
        return f"{found['median']:.1f} ({found['p10']:.1f}–{found['p90']:.1f})"

    rows = [
        (
            m["model"],
            f"{m['runtime']} {m['dtype']} ({m['provider']})",
            m["batch"],
            *(spread(m[name]) for name in ("ttft_ms", "tpot_ms") if m[name]),
            f"{m['tokens_per_second' if generates else 'samples_per_second']:.1f}",
            decimal(m["peak_memory_bytes"]),
            f"{m['load_seconds']:.1f}",
            decimal(m["bytes_on_disk"]),
            *(m[name]["verdict"] if m[name] else "baseline" for name in speedups),
        )
        for m in c["measurements"]
    ]
    machine = c["environment"]
    return [
        table(("model", "runtime", ">batch", *times, ">peak", ">load s", ">on disk", *speedups.values()), rows),
        *kernel_lines(c["measurements"]),
        f"{machine['cpu']}, {machine['threads']} threads, device {machine['device']}",
        *([f"warning: {warning}"] if (warning := noisy(machine)) else []),
    ]


def kernel_lines(measurements: list[dict[str, Any]]) -> list[str]:
    """The kernels of each model that multiply by weights, with the batch sizes; the JSON has the others."""

    def products(kernels: dict[str, int]) -> str:
        named = {name: n for name, n in kernels.items() if "(" not in name or PRODUCT.search(name)}
        return ", ".join(f"{n} × {name}" for name, n in named.items())

    batches: dict[str, list[str]] = defaultdict(list)
    for m in measurements:
        prefill, decode = products(m["prefill_kernels"]), m["decode_kernels"] and products(m["decode_kernels"])
        if m["decode_kernels"] is None:
            said = f"forward pass on {prefill}"
        else:
            same = prefill == decode
            said = f"prefill and decode on {decode}" if same else f"prefill on {prefill}; decode on {decode}"
        batches[f"{m['model']}: {said}"].append(str(m["batch"]))
    return [f"{line} (batch {', '.join(of)})" for line, of in batches.items()]


def inspect(c: dict[str, Any]) -> list[Any]:
    headings = ("layer", "shape", ">nonzero", ">empty rows", ">empty columns", ">row spread", ">column spread")
    rows = [
        (
            layer["name"],
            "{}×{}".format(*layer["shape"]),
            f"{100 * layer['nonzeros'] / (layer['shape'][0] * layer['shape'][1]):.2f} %",
            layer["empty_rows"],
            layer["empty_columns"],
            f"{layer['row_spread']:.3f}",
            f"{layer['column_spread']:.3f}",
            ", ".join(layer["patterns"]) or "none",
        )
        for layer in c["layers"]
    ]
    shares = ("nonzeros", "kept_rows", "gone_rows", "kept_columns", "gone_columns")
    kinds = [(k["kind"], k["layers"], *(f"{100 * k[name]:.2f} %" for name in shares)) for k in c["kinds"]]
    names = ("kind of layer", ">layers", ">nonzero", ">rows kept", ">rows gone", ">columns kept", ">columns gone")
    share = 100 * c["nonzeros"] / c["weights"]
    return [
        table((*headings, "patterns that hold"), rows),
        table(names, kinds),
        f"{c['nonzeros']:,} of {c['weights']:,} weights are nonzero ({share:.2f} %)",
        *([f"heat map: {c['heat_map']}"] if c["heat_map"] else []),
    ]


def run(result: Any) -> list[Any]:
    from gblm_compress.runs import report, tables
    from gblm_compress.runs.dry_run import DryRun
    from gblm_compress.runs.run_report import REPORT, headline

    if isinstance(result, DryRun):
        return dry_run(result)
    verdict, output = report.verdict(result), Path(result.output)
    found = [part for content in tables.of(result) if content.title in report.SHORT for part in titled(content)]
    if reused := [stage.name for stage in result.stages if stage.reused]:
        found.append("reused: " + ", ".join(reused))
    if warning := result.conditions.get("warning"):
        found.append(f"warning: {warning}")
    found += [f"artefacts: {output}", f"report: {output / report.PAGE} (and {REPORT}, {report.PICTURES}/)", ""]
    colour = "bold red" if verdict == "FAIL" else "bold"
    return [*found, Text.assemble((f"{verdict}: " if verdict else "", colour), printable(headline(result)))]


def gates(failed: Iterable[Any]) -> list[str]:
    """Gates that failed, in words."""
    from gblm_compress.runs.report import sentence

    return [sentence(gate) for gate in failed]


def dry_run(result: Any) -> list[Any]:
    rows = []
    for number, step in enumerate(result.steps, 1):
        stays = step.disk.stays if step.disk and step.fate != "reuse" else 0
        seconds = "" if step.seconds is None else f"{step.seconds:.0f} s"
        rows.append((number, step.does, step.fate, decimal(stays) if stays else "", seconds))
    limits = ", ".join(f"{name} {value}" for group in result.gates for name, value in group.items())
    needed, free = "not known until the model is on this machine", decimal(result.free_bytes)
    if result.bytes is not None:
        needed = f"at most {decimal(result.bytes)}, temporary files included"
    time = "not known; some of these stages have not been done in this folder yet"
    if result.seconds is not None:
        time = f"{result.seconds:.0f} s when these stages were last done in this folder"
    return [
        table(("", "stage", "what would happen", ">disk, at most", ">last time"), rows),
        *([f"gates to check: {limits}"] if limits else []),
        f"disk: {needed}; {free} are free",
        f"time: {time}",
        f"output: {result.output}",
        *_unchecked(result.unchecked),
    ]


def _unchecked(names: list[str]) -> list[str]:
    return [f"not looked at before the run, as it is not on this machine yet: {name}" for name in names]


def validate(c: dict[str, Any]) -> list[Any]:
    return [f"{c['path']}: valid", *_unchecked(c["unchecked"])] if c["valid"] else []


def report(result: Any) -> list[Any]:
    from gblm_compress.runs.history import runs

    changes = titled(result.changes) if result.changes else []
    return [*titled(runs(result.runs)), *changes, f"page: {result.page}"]


def push(c: dict[str, Any]) -> list[Any]:
    said = f"pushed to {c['pushed_to']}" if c["pushed_to"] else "not pushed; give --push-to-hub OWNER/NAME"
    return [*c["card"].splitlines(), f"files: {', '.join(c['files'])}", said]


def doctor(c: dict[str, Any]) -> list[Any]:
    def found(finding: dict[str, Any]) -> Text:
        return Text.assemble(("" if finding["ok"] else "!! ", "bold red"), printable(finding["found"]))

    return [table(("", "found", "enables"), ((f["subject"], found(f), f["enables"]) for f in c["findings"]))]


OF_RUNS = ("run", "report")  # whose summaries read the result itself, the others its plain values
SUMMARIES: dict[str, Callable[[Any], list[Any]]] = {
    summary.__name__: summary
    for summary in (
        advise, prune, generate, recover, export, evaluate, compare, benchmark, inspect, run, report, push,
        validate, doctor,
    )
}  # fmt: skip
