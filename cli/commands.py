"""The commands on one stage: parse, call it, print. Those on whole runs are in `run_commands`.

Stages are imported inside and last: `--help` loads no torch, and a misspelt path is found before torch is loaded.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from gblm_compress.cli import options as o
from gblm_compress.cli import run_commands, session, summaries
from gblm_compress.cli.options import Spelt, from_settings
from gblm_compress.settings import (
    AdviseSettings,
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    ComputeSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    PruneSettings,
    RecoverSettings,
    ResourceSettings,
)
from gblm_compress.storage import outputs


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
    progress, source = session.start(model, quiet=quiet or not reports, datasets=datasets)

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
        session.show(result.as_dict(), summaries.prune, json_)


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
    progress, source, dense = session.start(model, teacher, quiet=quiet or not reports, datasets=datasets)

    from gblm_compress.recovery import stage

    result = stage.recover(
        source, dense, output, settings, resume=resume, device=compute.device, force=force, progress=progress
    )
    if reports:
        session.show(result.as_dict(), summaries.recover, json_)


@from_settings
def generate(
    model: o.Model,
    output: o.TextFile,
    settings: GenerateSettings,
    compute: Annotated[ComputeSettings, Spelt(leave_out=("dtype",))],
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Let a model write text, to calibrate and train on where real text of its kind is short."""
    outputs.check_file(output, ".txt", "text")
    progress, source = session.start(model, quiet=quiet, datasets=[settings.starts] if settings.starts else [])

    from gblm_compress.calibration import generation

    result = generation.generate(source, output, settings, device=compute.device, progress=progress)
    session.show(result.as_dict(), summaries.generate, json_)


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
    progress, source = session.start(model, quiet=quiet)

    from gblm_compress import exporters

    result = exporters.export(source, output, settings, force=force, progress=progress)
    session.show(result.as_dict(), summaries.export, json_)


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
    progress, source, *dense = session.start(
        *models, quiet=quiet, datasets=[settings.dataset], include=settings.include_path
    )

    from gblm_compress.measure import evaluation

    result = evaluation.evaluate(
        source,
        settings,
        baseline=dense[0] if dense else None,
        dtype=compute.dtype,
        device=compute.device,
        progress=progress,
    )
    session.show(result.as_dict(), summaries.evaluate, json_)


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
    progress, source = session.start(model, quiet=quiet)

    from gblm_compress.runs import advice

    result = advice.advise(source, settings, pruning, text, progress=progress)
    session.show(result.as_dict(), summaries.advise, json_)


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
    progress, source = session.start(model, quiet=quiet, datasets=datasets, include=evaluation.include_path)

    from gblm_compress.runs import comparison

    result = comparison.compare(
        source, output, grid, text, evaluation, dtype=compute.dtype, device=compute.device, progress=progress
    )
    session.show(result.as_dict(), summaries.compare, json_)


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
    progress, *sources = session.start(*models, *baseline, quiet=quiet)
    contenders, baselines = sources[: len(models)], sources[len(models) :]

    from gblm_compress.measure import benchmarking

    result = benchmarking.benchmark(
        contenders, baselines, settings, dtype=compute.dtype, device=compute.device, progress=progress
    )
    session.show(result.as_dict(), summaries.benchmark, json_)


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
        outputs.check_file(heat_map, ".png", "heat map", force)
    progress, source = session.start(model, quiet=quiet)

    from gblm_compress.measure import inspection

    result = inspection.inspect(source, heat_map, progress, force=force)
    session.show(result.as_dict(), summaries.inspect, json_)


def doctor(json_: o.Json = False) -> None:
    """Say what this machine has, and what each finding enables."""
    from dataclasses import asdict

    session.started(quiet=json_)

    from gblm_compress.measure.doctor import diagnose

    findings = [asdict(finding) for finding in diagnose()]
    session.show({"findings": findings, "ok": all(f["ok"] for f in findings)}, summaries.doctor, json_)


COMMANDS = (
    advise, prune, generate, recover, export, evaluate, compare, benchmark, inspect, *run_commands.COMMANDS,
    doctor,
)  # fmt: skip
