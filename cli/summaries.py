"""The summary that each command prints: tables, sentences, and the next command."""

import math
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gblm_compress.command import flag_of
from gblm_compress.formats import MOST_NONZEROS
from gblm_compress.machine import cost, noisy
from gblm_compress.methods.patterns import DENSE
from gblm_compress.printing import PlainConsole, printable, table
from gblm_compress.settings.fields import SELF
from gblm_compress.storage import outputs, records

Arguments = Mapping[str, Any] | None
WIDTH_OF_FILES = 160  # columns, if the output is not a terminal
COLOURS = {"good": "green", "bad": "bold red", "": ""}
NEXT = "next: gblm-compress "
NOT_YET = "The folder is neither smaller nor faster than the dense model until you export it."
TRIALS = ("demo", "tiny")  # models that are small enough to try a command
PRODUCT = re.compile("MatMul|Gemm|Linear")


def show(command: str, result: Any, as_json: bool, given: Arguments = None, views: Arguments = None) -> None:
    """Print a result as JSON or as `parts`. Of several processes that torchrun started, the first prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json or command == "schema":
        print(records.as_json(_plain(result)), end="")
        return
    console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=WIDTH_OF_FILES)
    for part in parts(command, result, given, views):
        console.show(part)


def views(command: str) -> list[Parameter]:
    """The keywords of a command's summary, which a user may ask for."""
    return list(signature(SUMMARIES[command]).parameters.values())[1:] if command in SUMMARIES else []


def parts(command: str, result: Any, given: Arguments = None, views: Arguments = None) -> list[Any]:
    """The tables and sentences that sum up a result, and the next command.

    Args:
        given: the arguments that were given, by name, for the next command; None names none.
        views: the keywords of the summary.
    """
    content = result if command in ("run", "report") else _plain(result)
    words: tuple[str, ...] = ()
    if given is not None and "quiet" not in given and command in FOLLOWING:
        words = FOLLOWING[command](content, given)
    return [*SUMMARIES[command](content, **(views or {})), *([NEXT + shlex.join(words)] if words else ())]


def _plain(result: Any) -> Any:
    return result.as_dict() if hasattr(result, "as_dict") else result


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


NAMED: dict[str, Callable[[Any], str]] = {
    "bytes": decimal,
    "spread": "{0[median]:.1f} ({0[p10]:.1f}–{0[p90]:.1f})".format,
    "verdict": lambda speedup: speedup["verdict"] if speedup else "baseline",
    "ratio": "{0[ratio]:.3f} ({0[low]:.3f}–{0[high]:.3f})".format,
}


class _Cells(Formatter):
    """`str.format` with the formats of `NAMED`, ± before an error, and nothing for None."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None and format_spec != "verdict":
            return ""
        if format_spec in NAMED:
            return NAMED[format_spec](value)
        sign = " ± " if format_spec.startswith("±") else ""
        return sign + format(value, format_spec.removeprefix("±"))


CELLS = _Cells()


def _table(columns: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of rows; the columns are "heading = format | heading = format"."""
    forms = dict(column.strip().split(" = ") for column in columns.split("|"))
    return table(forms, ([CELLS.format(form, **row) for form in forms.values()] for row in rows))


def _facts(facts: Mapping[str, str | None], cost: Mapping[str, Any] | None = None) -> Table:
    """A table of the facts that are known, and of the cost of a stage."""
    known = dict(facts)
    if cost:
        memory = cost.get("peak_memory_bytes")
        known |= {"time": _duration(cost["seconds"]), "peak memory": memory and decimal(memory)}
        known |= {"written to": cost["folder"]}
    return table(("", ""), ((name, fact) for name, fact in known.items() if fact), show_header=False)


def prune(c: dict[str, Any]) -> list[Any]:
    from gblm_compress.models.manifest import reasons

    patterns, zeros = {layer["pattern"] for layer in c["layers"].values()}, c["weights"] - c["nonzeros"]
    facts = {
        "pruned layers": f"{len(c['layers'])}, with {c['weights'] / c['linear_weights']:.1%} of all linear weights",
        "pattern": f"{', '.join(sorted(patterns))}, verified on disk",
        "zeros": f"{zeros:,} of {c['weights']:,} ({zeros / c['weights']:.2%})",
        "grid": c["grid"] and f"{c['grid']}, verified on disk",
        "left dense": reasons(c["left_dense"]),
    }
    notes = [f"note: {warning}" for warning in c["warnings"]]
    return [_facts(facts, c), NOT_YET, *notes]


def plan(c: dict[str, Any]) -> list[Any]:
    place = "read from disk, a block at a time" if c["from_disk"] else "in memory"
    facts = {
        "weights": f"{c['weights'] / 1e6:,.1f} million, {place}",
        "computed in": f"{c['dtype']} on {c['device']}",
        "passes over the text": f"about {c['passes']:.0f}",
        "time": f"{cost.words(c['seconds'])} on this machine",
        "peak memory": f"at most {decimal(c['memory_bytes'])}",
        "disk": f"at most {decimal(c['disk_bytes'])}, until the output is whole",
    }
    return [_facts(facts)]


def advise(c: dict[str, Any]) -> list[Any]:
    columns = "way = {name} | >weights = {bytes:bytes} | >ms per token = {ms_per_token:.2f} ({low:.2f}–{high:.2f})"
    notes = [f"note: {way} does not work here: {reason}" for way, reason in c["left_out"].items()]
    return [_table(columns, c["predictions"]), *c["sentences"], *notes]


def recover(c: dict[str, Any]) -> list[Any]:
    columns = ">tokens = {tokens:,} | >training loss = {loss:.4f} | >validation loss = {held_out:.4f}{mark}"
    curve = [look | {"mark": " *" if number == c["best"] else ""} for number, look in enumerate(c["curve"])]
    facts = {
        "validation loss": f"{c['before']:.4f} before, {c['after']:.4f} after ({c['loss_unit']})",
        "kept": f"the weights after {curve[c['best']]['tokens']:,} tokens (*)",
        "trained": f"{c['trained']:,} weights at rate {c['rate']:g}; the pattern is verified on disk",
        "data": f"each sample read {c['passes']:.1f} times on average",
        **{f"overlap with {name}": f"{share:.2%}" for name, share in c["overlap"].items()},
    }
    return [_table(columns, curve), _facts(facts, c), NOT_YET]


def export(c: dict[str, Any]) -> list[Any]:
    facts = {"format": c["format"], "size": CELLS.format("{bytes:bytes} (source {source_bytes:bytes})", **c)}
    for name, value in c["checks"].items():
        said = decimal(value) if name.endswith("_bytes") else f"{value:.3g}" if isinstance(value, float) else str(value)
        facts[name.removesuffix("_bytes").replace("_", " ")] = said
    return [_facts(facts, c)]


def evaluate(c: dict[str, Any]) -> list[Any]:
    is_text, facts = c["sample"] == "window", {}
    names = {
        "mean_kl": ("mean KL from dense", f"{{0:z.4f}} nats per {'token' if is_text else c['sample']}"),
        "top1_agreement": ("top-1 agreement", "{0:.2%}"),
        "top10_agreement": ("dense top 10 kept", "{0:.2%}"),
    }
    for metric in c["metrics"][:1]:
        facts[metric] = CELLS.format(f"{{{metric}:.3f}}{{{metric}_error:±.3f}}", **c)
        facts[f"{metric}, dense"] = CELLS.format(f"{{baseline_{metric}:.3f}}", **c)
    for name, value in (c["fidelity"] or {}).items():
        said, form = names.get(name, (f"{name.replace('_', ' ')} with dense", "{0:.4f}"))
        facts[said] = form.format(value)
    length = f" of {c['sequence_length']} tokens" if is_text else ""
    if c["windows"]:
        facts["data"] = f"{c['dataset']}: {c['windows']} {c['sample']}{'s' * (c['windows'] != 1)}{length}"
        facts["note"] = c["note"]
    facts["computed in"] = f"{c['dtype']} on {c['provider']}"
    if not (zero_shot := c["zero_shot"]):
        return [_facts(facts)]
    mean = dict.fromkeys(("metric", "questions", "error", "dense_accuracy")) | {"task": "mean"}
    mean |= {"accuracy": zero_shot["mean_accuracy"], "recovery": zero_shot["recovery"]}
    columns = (
        "task = {task} | metric = {metric} | >questions = {questions} | >accuracy = {accuracy:.3f}{error:±.3f}"
        " | >dense = {dense_accuracy:.3f} | >recovery (95 %) = {recovery:ratio}"
    )
    return [_facts(facts), _table(columns, [*zero_shot["tasks"], mean])]


def compare(c: dict[str, Any]) -> list[Any]:
    from gblm_compress.tasks import same_text

    columns = (
        "method = {method} | pattern = {pattern} | >seeds = {seeds} | >perplexity = {perplexity:.2f}"
        "{perplexity_error:±.2f} | >KL from dense = {mean_kl:.3f}{mean_kl_error:±.3f} | >accuracy = {accuracy:.3f}"
        " | >recovery = {recovery:.3f} | >time = {seconds:.0f} s"
    )
    note = same_text(c["evaluation"]["dataset"], c["calibration"]["dataset"])
    dense = f"dense: perplexity {c['dense_perplexity']:.2f}{note and f'; {note}'}"
    return [_table(columns, c["rows"]), dense, f"plot: {c['plot']}"]


def benchmark(c: dict[str, Any]) -> list[Any]:
    columns = "model = {model} | runtime = {runtime} {dtype} ({provider}) | >batch = {batch}"
    costs = ">peak = {peak_memory_bytes:bytes} | >load s = {load_seconds:.1f} | >on disk = {bytes_on_disk:bytes}"
    if any(m["tpot_ms"] for m in c["measurements"]):
        times = ">TTFT ms (p10–p90) = {ttft_ms:spread} | >TPOT ms (p10–p90) = {tpot_ms:spread}"
        columns += f" | {times} | >tokens/s = {{tokens_per_second:.1f}} | {costs}"
        columns += " | prefill = {prefill_speedup:verdict} | decode = {decode_speedup:verdict}"
    else:
        columns += f" | >ms (p10–p90) = {{ttft_ms:spread}} | >samples/s = {{samples_per_second:.1f}} | {costs}"
        columns += " | against dense = {prefill_speedup:verdict}"
    machine = c["environment"]
    where = f"{machine['cpu']}, {machine['threads']} threads, device {machine['device']}"
    warnings = [f"warning: {warning}"] if (warning := noisy(machine)) else []
    return [_table(columns, c["measurements"]), *kernel_lines(c["measurements"]), where, *warnings]


def kernel_lines(measurements: list[dict[str, Any]]) -> list[str]:
    """The kernels of each model that multiply by weights, and their batch sizes. The JSON has all kernels."""

    def products(kernels: dict[str, int] | None) -> str:
        named = {name: n for name, n in (kernels or {}).items() if "(" not in name or PRODUCT.search(name)}
        return ", ".join(f"{n} × {name}" for name, n in named.items())

    batches: dict[str, list[str]] = defaultdict(list)
    for m in measurements:
        prefill, decode = products(m["prefill_kernels"]), products(m["decode_kernels"])
        said = f"prefill and decode on {decode}" if prefill == decode else f"prefill on {prefill}; decode on {decode}"
        if m["decode_kernels"] is None:
            said = f"forward pass on {prefill}"
        batches[f"{m['model']}: {said}"].append(str(m["batch"]))
    return [f"{line} (batch {', '.join(of)})" for line, of in batches.items()]


def inspect(
    c: dict[str, Any], layers: Annotated[bool, "Print the table of every layer too; --json always has it."] = False
) -> list[Any]:
    columns = (
        "layer = {name} | shape = {shape[0]}×{shape[1]} | >nonzero = {share:.2%} | >empty rows = {empty_rows}"
        " | >empty columns = {empty_columns} | >row spread = {row_spread:.3f}"
        " | >column spread = {column_spread:.3f} | patterns that hold = {holds}"
    )
    kinds = (
        "kind of layer = {kind} | >layers = {layers} | >nonzero = {nonzeros:.2%} | >rows kept = {kept_rows:.2%}"
        " | >rows gone = {gone_rows:.2%} | >columns kept = {kept_columns:.2%} | >columns gone = {gone_columns:.2%}"
    )
    total = f"{c['nonzeros']:,} of {c['weights']:,} weights are nonzero ({c['nonzeros'] / c['weights']:.2%})"
    patterns = Counter(pattern for layer in c["layers"] for pattern in layer["patterns"])
    holding = [f"{pattern} in {number} of {len(c['layers'])} layers" for pattern, number in patterns.items()]
    heat_map = [f"heat map: {c['heat_map']}"] if c["heat_map"] else []
    found = [total, f"patterns that hold: {', '.join(holding) or 'none'}", _table(kinds, c["kinds"]), *heat_map]
    if not layers:
        return [*found, "--layers shows every layer"]
    rows = []
    for layer in c["layers"]:
        share, holds = layer["nonzeros"] / math.prod(layer["shape"]), ", ".join(layer["patterns"]) or "none"
        rows.append(layer | {"share": share, "holds": holds})
    return [*found, _table(columns, rows)]


def titled(content: Any) -> list[Any]:
    """A table of a report, with its title and notes."""
    headings = [f">{name}" if number else name for name, number in content.columns.items()]
    rows = [[Text(printable(cell.text), style=COLOURS[cell.mark]) for cell in row] for row in content.rows]
    title = Text(content.title, style="bold")
    return [table(headings, rows, title=title, title_justify="left"), *content.all_notes]


def run(result: Any) -> list[Any]:
    from gblm_compress.runs import report, tables
    from gblm_compress.runs.run_report import REPORT, headline

    word, output = report.pass_or_fail(result), Path(result.output)
    found = [part for content in tables.of(result) if content.title in report.SHORT for part in titled(content)]
    if reused := [stage.name for stage in result.stages if stage.reused]:
        found.append("reused: " + ", ".join(reused))
    found += [f"{name}: {said}" for name in ("warning", "kernels") if (said := result.conditions.get(name))]
    found += [f"artefacts: {output}", f"report: {output / report.PAGE} (and {REPORT}, {report.PICTURES}/)", ""]
    colour = "bold red" if word == "FAIL" else "bold"
    return [*found, Text.assemble((f"{word}: " if word else "", colour), printable(headline(result)))]


def validate(c: dict[str, Any]) -> list[Any]:
    if not c["valid"]:
        return []
    said = [f"• {stage}" for stage in c["stages"]] + [f"note: {note}" for note in c["notes"]]
    said += [f"not checked before the run, as it is not on this machine yet: {name}" for name in c["unchecked"]]
    return [f"{c['path']}: valid", *said]


def report(result: Any) -> list[Any]:
    from gblm_compress.runs.run_report import headline

    changes = titled(result.changes) if result.changes else []
    return [*(headline(run) for run in result.runs), *changes, f"page: {result.page}"]


def push(c: dict[str, Any]) -> list[Any]:
    said = f"pushed to {c['pushed_to']}" if c["pushed_to"] else "not pushed; give --push-to-hub OWNER/NAME"
    return [*c["card"].splitlines(), f"files: {', '.join(c['files'])}", said]


def doctor(c: dict[str, Any]) -> list[Any]:
    def found(finding: dict[str, Any]) -> Text:
        return Text.assemble(("" if finding["ok"] else "!! ", "bold red"), printable(finding["found"]))

    return [table(("", "found", "enables"), ((f["subject"], found(f), f["enables"]) for f in c["findings"]))]


SUMMARIES: dict[str, Callable[..., list[Any]]] = {
    summary.__name__: summary
    for summary in (
        advise, plan, prune, recover, export, evaluate, compare, benchmark, inspect, run, report, push,
        validate, doctor,
    )
}  # fmt: skip


def _flags(**options: Any) -> tuple[str, ...]:
    """The options that have a value, as words."""
    return tuple(word for name, value in options.items() if value for word in (flag_of(name), str(value)))


def _manifest(folder: str) -> dict[str, Any]:
    """The manifest of a folder made here; empty if there is none."""
    path = Path(folder) / outputs.MANIFEST
    return records.read_json(path) if path.is_file() else {}


def _dense_of(made: str) -> str:
    """The dense model of a folder made here, or MODEL if no name finds it; manifests have no paths of this disk."""
    name = _manifest(made).get("base_model", {}).get("name") or "MODEL"
    return name if name in TRIALS or "/" in name or Path(name).is_dir() else "MODEL"


def _prune(model: str, **options: Any) -> tuple[str, ...]:
    trial = {"samples": 16, "sequence_length": 512} if model in TRIALS else {}
    given = {name: value for name, value in options.items() if value}
    return ("prune", model, "-o", "pruned", *_flags(**trial | given))


def _planned(_: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    several = {name: ",".join(map(str, value)) for name, value in given.items() if isinstance(value, list | tuple)}
    options = dict(given) | several
    return ("prune", options.pop("model"), "-o", "pruned", *_flags(**options))


def _evaluate(made: str, dense: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """On the evaluation part of the given text, if it has one; on `demo` if none was given."""
    text = given.get("calibration", SELF)
    options = _flags(
        dataset="demo" if text == SELF else text if text in ("demo", "wikitext2", "c4") else None,
        sequence_length=given.get("sequence_length") or 512,
        max_windows=16,
    )
    return ("evaluate", made, "--baseline", dense, *options)


def _go_on(
    model: str, *, is_text: bool = False, is_sparse: bool = False, calibration: str | None = None
) -> tuple[str, ...]:
    """Prune a dense model, export a pruned one, time an export. Nothing follows a dense export, which is a baseline.

    `is_sparse`: the weights have the zeros of a pruning, perhaps of another tool's. `calibration` is for a model that
    writes no text of its own.
    """
    made = _manifest(model)
    kind = made.get("kind")
    if kind is None and not is_sparse:
        return _prune(model, calibration=calibration)
    if kind == "export":
        return ("benchmark", model, "--baseline", _dense_of(model)) if "prune" in made else ()
    settings, onnx = made.get("prune", {}), ("-o", str(Path(model).with_name("onnx")), "--format", "onnx")
    if settings.get("pattern") == DENSE:
        return ("export", model, *onnx, "--quantise", settings["quantise"])
    smaller = ("--quantise", "int8") if is_text else ()
    return ("export", model, *onnx, *smaller, "--kernels")


def _advised(best: dict[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    model = given["model"]
    if best["kind"] == "pruned":
        return _prune(model, pattern=given.get("pattern"), sparsity=given.get("sparsity"))
    if (bits := best["export"]["quantise"]) == "int4":  # rounded without a fit, 4 bits cost much
        return _prune(model, pattern=DENSE, quantise=bits)
    kernels = ("--kernels",) if best["export"].get("kernels") else ()
    return ("export", model, "-o", "onnx", "--format", "onnx", "--quantise", bits, *kernels)


def _compared(c: dict[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    if not (rows := [row for row in c["rows"] if row.get("perplexity")]):
        return ()
    best = min(rows, key=lambda row: row["perplexity"])
    text = {name: given.get(name) for name in ("calibration", "samples", "sequence_length")}
    return _prune(given["model"], method=best["method"], pattern=best["pattern"], **text)


def _push(run: str, best: str | None) -> tuple[str, ...]:
    return ("push", run, best) if best and (Path(run) / best).is_dir() else ()


def _timed(model: str, baseline: str) -> tuple[str, ...]:
    """Evaluate a timed export; export a timed folder."""
    return _evaluate(model, baseline, {}) if _manifest(model).get("kind") == "export" else _go_on(model)


FOLLOWING: dict[str, Callable[[Any, Mapping[str, Any]], tuple[str, ...]]] = {
    "advise": lambda c, given: _advised(c["advised"], given) if c["advised"] else (),
    "plan": _planned,
    "prune": lambda c, given: _evaluate(c["folder"], given["model"], given),
    "recover": lambda c, given: _evaluate(c["folder"], given["teacher"], {}),
    "evaluate": lambda c, given: _go_on(
        given["model"],
        is_text=c["sample"] == "window",
        calibration=None if c["sample"] == "window" else given["dataset"],
    ),
    "export": lambda c, given: _go_on(c["folder"]) or _evaluate(c["folder"], given["model"], {}),
    "inspect": lambda c, given: _go_on(given["model"], is_sparse=c["nonzeros"] <= MOST_NONZEROS * c["weights"]),
    "benchmark": lambda _, given: _timed(given["models"][0], given["baseline"][0]),
    "report": lambda result, given: _push(given["runs"][-1], result.runs[-1].best),
    "compare": _compared,
    "run": lambda result, _: _push(result.output, result.best),
    "validate": lambda _, given: ("run", given["recipe"], *(f"--set={change}" for change in given.get("set", ()))),
    "doctor": lambda c, _: ("run", "quickstart") if c["ok"] else (),
}
"""The words of the next command, from a result and the given arguments. MODEL is an unknown dense model."""
