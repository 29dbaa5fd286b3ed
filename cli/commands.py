"""The commands: parse, call one stage, print.

Stages are imported inside and last: `--help` loads no torch, and a misspelt path is found before torch is loaded.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gblm_compress import __version__
from gblm_compress.cli import layout, summaries
from gblm_compress.cli import options as o
from gblm_compress.cli.options import Spelt, from_settings
from gblm_compress.errors import GateError, GblmError
from gblm_compress.machine.environment import share_cores
from gblm_compress.printing import PlainConsole
from gblm_compress.progress import Progress
from gblm_compress.settings import (
    AdviseSettings,
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    ComputeSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
    RecoverSettings,
    ResourceSettings,
)
from gblm_compress.storage import outputs, records

DOCUMENT = "gblm-compress"  # which every document of this program begins with
WIDTH_OF_FILES = 160  # columns, where the output is no terminal and has no width of its own


@from_settings
def prune(
    model: o.Model,
    output: o.Output,
    settings: Annotated[PruneSettings, Spelt(rename={"overrides": "override"})],
    text: Annotated[CalibrationSettings, Spelt(rename={"dataset": "calibration"})],
    compute: ComputeSettings,
    resources: ResourceSettings,
    resume: o.Resume = False,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Set the least important weights to zero, and fit the others to make up for it."""
    reports = os.environ.get("RANK", "0") == "0"  # of several processes started by torchrun, the first one reports
    outputs.check_output(output, force)
    datasets = [text.dataset] if settings.needs_text else []
    progress, source = _start(model, quiet=quiet or not reports, datasets=datasets)

    from gblm_compress.pruning import stage

    result = stage.prune(
        source,
        output,
        settings,
        text,
        resources=resources,
        resume=resume,
        dtype=compute.dtype,
        device=compute.device,
        force=force,
        progress=progress,
    )
    if reports:
        _show(result.as_dict(), summaries.prune, json_)


@from_settings
def recover(
    model: o.Pruned,
    teacher: o.Teacher,
    output: o.Output,
    settings: RecoverSettings,
    compute: Annotated[ComputeSettings, Spelt(leave_out=("dtype",))],
    resume: o.Resume = False,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a pruned model to predict what the dense one does; its pattern stays."""
    reports = os.environ.get("RANK", "0") == "0"
    outputs.check_output(output, force)
    datasets = settings.datasets
    progress, source, dense = _start(model, teacher, quiet=quiet or not reports, datasets=datasets)

    from gblm_compress.recovery import stage

    result = stage.recover(
        source, dense, output, settings, resume=resume, device=compute.device, force=force, progress=progress
    )
    if reports:
        _show(result.as_dict(), summaries.recover, json_)


@from_settings
def export(
    model: o.Model,
    output: o.Output,
    settings: ExportSettings,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a model as ONNX or as sparse PyTorch, and verify what was written."""
    outputs.check_output(output, force)
    progress, source = _start(model, quiet=quiet)

    from gblm_compress import exporters

    result = exporters.export(source, output, settings, force=force, progress=progress)
    _show(result.as_dict(), summaries.export, json_)


@from_settings
def evaluate(
    model: o.Model,
    settings: EvaluateSettings,
    compute: ComputeSettings,
    baseline: o.Baseline = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure perplexity or the metric of another task, fidelity to the dense model, and zero-shot accuracy."""
    models = [model, baseline] if baseline else [model]
    progress, source, *dense = _start(*models, quiet=quiet, datasets=[settings.dataset], include=settings.include_path)

    from gblm_compress.measure import evaluation

    result = evaluation.evaluate(
        source,
        settings,
        baseline=dense[0] if dense else None,
        dtype=compute.dtype,
        device=compute.device,
        progress=progress,
    )
    _show(result.as_dict(), summaries.evaluate, json_)


@from_settings
def advise(
    model: o.Model,
    settings: AdviseSettings,
    pruning: Annotated[PruneSettings, Spelt(rename={"overrides": "override"})],
    text: Annotated[CalibrationSettings, Spelt(rename={"dataset": "calibration"})],
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Predict what compressing a model would bring on this machine, before any of it is done."""
    progress, source = _start(model, quiet=quiet)

    from gblm_compress.runs import advice

    result = advice.advise(source, settings, pruning, text, progress=progress)
    _show(result.as_dict(), summaries.advise, json_)


@from_settings
def compare(
    model: o.Model,
    grid: CompareSettings,
    text: Annotated[CalibrationSettings, Spelt(rename={"dataset": "calibration"}, leave_out=("seed",))],
    evaluation: Annotated[EvaluateSettings, Spelt(rename={"sequence_length": "evaluation_length"})],
    compute: ComputeSettings,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the records, table and plot.")] = Path(
        "comparison"
    ),
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Prune by several methods and patterns, and say what each quality costs; goes on where it was interrupted."""
    outputs.check_workable(output, "comparison")
    datasets = [text.dataset, evaluation.dataset]
    progress, source = _start(model, quiet=quiet, datasets=datasets, include=evaluation.include_path)

    from gblm_compress.runs import comparison

    result = comparison.compare(
        source, output, grid, text, evaluation, dtype=compute.dtype, device=compute.device, progress=progress
    )
    _show(result.as_dict(), summaries.compare, json_)


@from_settings
def benchmark(
    models: o.Models,
    baseline: o.Baselines,
    settings: BenchmarkSettings,
    compute: ComputeSettings,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time models beside the dense one, in one run: latency, throughput, memory, size."""
    progress, *sources = _start(*models, *baseline, quiet=quiet)
    contenders, baselines = sources[: len(models)], sources[len(models) :]

    from gblm_compress.measure import benchmarking

    result = benchmarking.benchmark(
        contenders, baselines, settings, dtype=compute.dtype, device=compute.device, progress=progress
    )
    _show(result.as_dict(), summaries.benchmark, json_)


def inspect(
    model: o.Model,
    heat_map: Annotated[
        Path | None, typer.Option(help="PNG to draw: how many weights survive in each column. Not drawn if unset.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the picture if it exists.")] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Report the zeros of every layer and the patterns that hold; with --heat-map, draw where weights survive."""
    if heat_map is not None:
        outputs.check_picture(heat_map, force)
    progress, source = _start(model, quiet=quiet)

    from gblm_compress.measure import inspection

    result = inspection.inspect(source, heat_map, progress, force=force)
    _show(result.as_dict(), summaries.inspect, json_)


def run(
    recipe: o.RecipeFile,
    set_: o.Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the artefacts; runs/RECIPE if unset.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="File to write: the gates as JUnit's XML.")] = None,
    summary: Annotated[Path | None, typer.Option(help="File to write: verdict and tables in Markdown.")] = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Carry out a recipe: prune, export, evaluate, benchmark, check gates."""
    from gblm_compress.runs.recipe import find_recipe, load_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path, tuple(set_ or ()))
    folder = output or Path("runs") / path.stem
    outputs.check_workable(folder, "run")
    written = [document for document in (junit, summary) if document is not None]
    for document in written:
        outputs.check_document(document, DOCUMENT)
    progress = _progress(quiet)

    from gblm_compress import faults
    from gblm_compress.runs import checks, pipeline
    from gblm_compress.runs import dry_run as looking
    from gblm_compress.runs import report as documents

    if dry_run:
        faults.raise_all(checks.check(loaded, progress) + checks.check_output(loaded, folder))
        return _show(looking.dry_run(loaded, folder, progress).as_dict(), summaries.dry_run, json_)
    result = pipeline.run(loaded, folder, progress)
    if junit is not None:
        records.write_text(junit, documents.junit(result))
    if summary is not None:
        records.write_text(summary, documents.markdown(result))
    _show(result, summaries.run, json_)
    if failed := result.failed_gates:
        count = f"{len(failed)} of {len(result.gates)} gates failed"
        raise faults.together(GateError, count, [documents.sentence(gate) for gate in failed])


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that `run` wrote, the newest last.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write.")] = Path("report.html"),
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="End with exit code 6 if a figure of the last run got worse.")
    ] = False,
    json_: o.Json = False,
) -> None:
    """Join the reports of several runs on one page: the last one against the one before it, and all over time."""
    outputs.check_document(output, DOCUMENT)

    from gblm_compress import faults
    from gblm_compress.runs import history, run_report
    from gblm_compress.runs.report import html

    reports = [run_report.read(run) for run in runs]
    records.write_text(output, history.html(reports) if len(reports) > 1 else html(reports[0]))
    changes = history.changes(*reports[-2:]) if len(reports) > 1 else None
    worse = history.regressions(changes) if changes else []
    content = {"page": str(output), "runs": [one.as_dict() for one in reports], "regressions": worse}
    _show(content, partial(summaries.report, reports, changes), json_)
    if worse and fail_on_regression:
        raise faults.together(GateError, f"{len(worse)} figures got worse", worse)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `run` wrote.")],
    artefact: Annotated[str, typer.Argument(metavar="ARTEFACT", help="The name of a folder in it: pruned, bitmask, …")],
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Repository to push to. If unset, nothing leaves the machine."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json_: o.Json = False,
) -> None:
    """Show the complete model card and the files of an artefact; with --push-to-hub, push them to the hub."""
    from gblm_compress.runs import pushing, run_report

    prepared = pushing.prepare(run_report.read(run), run, artefact)
    address = pushing.push(prepared, push_to_hub, private=private) if push_to_hub else None
    content = {"card": prepared.card, "files": [*prepared.files, pushing.CARD], "pushed_to": address}
    _show(content, summaries.push, json_)


def validate(recipe: o.RecipeFile, set_: o.Set = None, json_: o.Json = False) -> None:
    """Check a recipe, and whether this machine can carry it out; report all faults. Nothing is downloaded."""
    from gblm_compress import faults
    from gblm_compress.runs.recipe import find_recipe, load_recipe

    def look() -> Any:
        path = find_recipe(recipe)
        loaded = load_recipe(path, tuple(set_ or ()))

        from gblm_compress.runs import checks

        faults.raise_all(checks.check(loaded, _progress(quiet=True)))
        notes = summaries.unchecked(checks.unchecked(loaded))
        content = {"valid": True, "faults": [], "recipe": loaded.model_dump(mode="json")}
        _show(content, lambda content: [f"{path}: valid", *notes], json_)

    try:
        look()
    except GblmError as error:
        if json_:
            _show({"valid": False, "faults": faults.listed(error), "recipe": None}, None, json_)
        raise


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from gblm_compress.runs.recipe import schema

    print(json.dumps(schema(), indent=2))


def doctor(json_: o.Json = False) -> None:
    """Say what this machine has, and what each finding enables."""
    from dataclasses import asdict

    from gblm_compress.measure.doctor import diagnose

    findings = [asdict(finding) for finding in diagnose()]
    _show({"findings": findings, "ok": all(f["ok"] for f in findings)}, summaries.doctor, json_)


COMMANDS = (
    advise, prune, recover, export, evaluate, compare, benchmark, inspect, run, report, push, validate, schema, doctor
)  # fmt: skip


def _progress(quiet: bool) -> Progress:
    progress = _started(quiet)

    from gblm_compress.models.finding import silence_libraries

    share_cores()
    silence_libraries()
    return progress


def _started(quiet: bool) -> Progress:
    """A sign of life before the seconds that torch and transformers take to load."""
    progress = Progress(quiet)
    progress.say(f"gblm-compress {__version__} starts …")
    return progress


def _start(*models: str, quiet: bool, datasets: Sequence[str] = (), include: str | None = None) -> tuple[Any, ...]:
    """The progress, and the local folder of every model. What a name says of this machine is checked first: that is
    before a download, and before the seconds that torch and transformers take to load.
    """
    from gblm_compress import tasks
    from gblm_compress.measure.zero_shot import check_folder
    from gblm_compress.models.finding import resolve_model, silence_libraries

    for name in datasets:
        tasks.data_files(name)
    check_folder(include)
    progress = _started(quiet)
    paths_first = sorted(models, key=lambda name: not name.startswith((".", "/", "~")))
    sources = {name: resolve_model(name, progress) for name in paths_first}
    share_cores()
    silence_libraries()
    return progress, *(sources[name] for name in models)


def _show(content: Any, summary: Any, as_json: bool) -> None:
    """Print a result: one JSON document, or a summary for people."""
    if as_json:
        print(records.as_json(content if isinstance(content, dict) else content.as_dict()), end="")
        return
    console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=WIDTH_OF_FILES)
    parts = summary(content)
    for part in parts if isinstance(parts, list) else [parts]:
        layout.show(part, console)
