"""The commands: parse, call one stage, print. Stages are imported inside, so that `--help` loads no torch."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import gblm_compress
from gblm_compress.cli import options as o
from gblm_compress.errors import GateError
from gblm_compress.progress import Progress
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PruneSettings,
    ResourceSettings,
)

WIDTH_OF_FILES = 160  # columns, where the output is no terminal and has no width of its own


def _version(wanted: bool) -> None:
    if wanted:
        print(gblm_compress.__version__)
        raise typer.Exit


def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What holds for every command: only `--version`."""


def prune(
    model: o.Model,
    output: o.Output,
    preset: o.Preset = None,
    method: o.Method = None,
    pattern: o.Pattern = o.default(PruneSettings, "pattern"),
    sparsity: o.Sparsity = None,
    calibration: o.Calibration = o.default(CalibrationSettings, "dataset"),
    samples: o.Samples = o.default(CalibrationSettings, "samples"),
    sequence_length: o.CalibrationLength = o.default(CalibrationSettings, "sequence_length"),
    seed: o.Seed = o.default(CalibrationSettings, "seed"),
    update: o.Update = None,
    refine: o.Refine = None,
    allocation: o.Allocation = None,
    deviation: o.Deviation = None,
    override: o.Overrides = None,
    gradient_norm: o.GradientNorm = None,
    alpha: o.Alpha = None,
    alpha_scale: o.AlphaScale = None,
    damping: o.Damping = None,
    reconstruction_epochs: o.ReconstructionEpochs = None,
    reconstruction_rounds: o.ReconstructionRounds = None,
    reconstruction_rate: o.ReconstructionRate = None,
    distillation_epochs: o.DistillationEpochs = None,
    distillation_rate: o.DistillationRate = None,
    fit_dtype: o.FitDtype = None,
    targets: o.Targets = None,
    ignore: o.Ignore = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    memory: o.Memory = None,
    offload: o.Offload = None,
    resume: o.Resume = False,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Set the least important weights to zero; with a preset or an update, fit the others to make up for it."""
    settings = PruneSettings(
        **o.given(
            preset=preset,
            method=method,
            pattern=pattern,
            sparsity=sparsity,
            update=update,
            refine=refine,
            allocation=allocation,
            deviation=deviation,
            overrides=o.overrides(override),
            gradient_norm=gradient_norm,
            alpha=alpha,
            alpha_scale=alpha_scale,
            damping=damping,
            reconstruction_epochs=reconstruction_epochs,
            reconstruction_rounds=reconstruction_rounds,
            reconstruction_rate=reconstruction_rate,
            distillation_epochs=distillation_epochs,
            distillation_rate=distillation_rate,
            fit_dtype=fit_dtype,
            targets=o.split(targets) or None,
            ignore=o.split(ignore),
        )
    )
    text = CalibrationSettings(dataset=calibration, samples=samples, sequence_length=sequence_length, seed=seed)
    place = ModelSettings(source=model, dtype=dtype, device=device)
    resources = ResourceSettings(**o.given(memory=memory, offload=offload))

    from gblm_compress import pruning

    reports = os.environ.get("RANK", "0") == "0"  # of several processes started by torchrun, the first one reports
    source, progress = _start(model, quiet or not reports)
    result = pruning.prune(
        source,
        output,
        settings,
        text,
        resources=resources,
        resume=resume,
        dtype=place.dtype,
        device=device,
        force=force,
        progress=progress,
    )
    if reports:
        _show(result.as_dict(), _prune_summary, json_)


def export(
    model: o.Model,
    output: o.Output,
    format: o.Format,
    dtype: o.ExportDtype = "auto",
    sparse: o.Sparse = False,
    kernels: o.Kernels = False,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a model as ONNX or as sparse PyTorch, and verify what was written."""
    settings = ExportSettings(format=format, dtype=dtype, sparse=sparse, kernels=kernels)

    from gblm_compress import exporters

    source, progress = _start(model, quiet)
    result = exporters.export(source, output, settings, force=force, progress=progress)
    _show(result.as_dict(), _export_summary, json_)


def evaluate(
    model: o.Model,
    dataset: o.Dataset = o.default(EvaluateSettings, "dataset"),
    sequence_length: o.EvaluationLength = o.default(EvaluateSettings, "sequence_length"),
    max_windows: o.MaxWindows = None,
    baseline: o.Baseline = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    include_path: o.IncludePath = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure perplexity, fidelity to the dense model, and zero-shot accuracy."""
    settings = EvaluateSettings(
        dataset=dataset,
        sequence_length=sequence_length,
        max_windows=max_windows,
        tasks=o.split(tasks),
        limit=limit,
        include_path=include_path,
    )
    place = ModelSettings(source=model, dtype=dtype, device=device)

    from gblm_compress import evaluation, sources

    source, progress = _start(model, quiet)
    dense = sources.resolve_model(baseline, progress) if baseline else None
    result = evaluation.evaluate(source, settings, baseline=dense, dtype=place.dtype, device=device, progress=progress)
    _show(result.as_dict(), _evaluate_summary, json_)


def compare(
    model: o.Model,
    methods: o.Methods = None,
    patterns: o.Patterns = None,
    seeds: o.Seeds = o.default(CompareSettings, "seeds"),
    calibration: o.Calibration = o.default(CalibrationSettings, "dataset"),
    samples: o.Samples = o.default(CalibrationSettings, "samples"),
    sequence_length: o.CalibrationLength = o.default(CalibrationSettings, "sequence_length"),
    dataset: o.Dataset = o.default(EvaluateSettings, "dataset"),
    evaluation_length: Annotated[int, typer.Option(help="Tokens in a window of the evaluation.")] = o.default(
        EvaluateSettings, "sequence_length"
    ),
    max_windows: o.MaxWindows = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    include_path: o.IncludePath = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the records, table and plot.")] = Path(
        "comparison"
    ),
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Prune by several methods and patterns, and say what each quality costs; goes on where it was interrupted."""
    grid = CompareSettings(
        **o.given(methods=o.split(methods) or None, patterns=o.split(patterns) or None, seeds=seeds),
    )
    text = CalibrationSettings(dataset=calibration, samples=samples, sequence_length=sequence_length)
    evaluation = EvaluateSettings(
        dataset=dataset,
        sequence_length=evaluation_length,
        max_windows=max_windows,
        tasks=o.split(tasks),
        limit=limit,
        include_path=include_path,
    )
    place = ModelSettings(source=model, dtype=dtype, device=device)

    from gblm_compress import comparison

    source, progress = _start(model, quiet)
    result = comparison.compare(
        source, output, grid, text, evaluation, dtype=place.dtype, device=device, progress=progress
    )
    _show(result.as_dict(), _compare_summary, json_)


def benchmark(
    models: o.Models,
    baseline: o.Baselines,
    batch: o.Batch = "1",
    prompt: o.Prompt = o.default(BenchmarkSettings, "prompt"),
    generate: o.Generate = o.default(BenchmarkSettings, "generate"),
    runtime: o.RuntimeNames = None,
    repeats: o.Repeats = o.default(BenchmarkSettings, "repeats"),
    warmup: o.Warmup = o.default(BenchmarkSettings, "warmup"),
    threads: o.Threads = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time models beside the dense one, in one run: latency, throughput, memory, size."""
    settings = BenchmarkSettings(
        batch=o.split([batch]),
        prompt=prompt,
        generate=generate,
        runtimes=o.split(runtime) or o.default(BenchmarkSettings, "runtimes"),
        repeats=repeats,
        warmup=warmup,
        threads=threads,
    )
    place = ModelSettings(source=models[0], dtype=dtype, device=device)

    from gblm_compress import benchmarking, sources

    progress = _progress(quiet)
    contenders = [sources.resolve_model(name, progress) for name in models]
    baselines = [sources.resolve_model(name, progress) for name in baseline]
    result = benchmarking.benchmark(
        contenders, baselines, settings, dtype=place.dtype, device=device, progress=progress
    )
    _show(result.as_dict(), _benchmark_summary, json_)


def inspect(
    model: o.Model,
    heat_map: Annotated[
        Path, typer.Option(help="PNG to draw the surviving weights in; gblm-survivors.png here if unset.")
    ] = Path("gblm-survivors.png"),
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Report the zeros of every layer, the patterns that hold, and draw where weights survive."""
    from gblm_compress import inspection

    source, progress = _start(model, quiet)
    _show(inspection.inspect(source, heat_map, progress).as_dict(), _inspect_summary, json_)


def run(
    recipe: o.RecipeFile,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, for example prune.alpha=50."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the artefacts; runs/RECIPE if unset.")
    ] = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Carry out a recipe: prune, export, evaluate, benchmark, check gates."""
    from gblm_compress.recipe import find_recipe, load_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path, tuple(set_ or ()))
    folder = output or Path("runs") / path.stem

    from gblm_compress import pipeline

    if dry_run:
        steps = pipeline.plan(loaded)
        return _show({"output": str(folder), "steps": steps}, _plan_summary, json_)
    result = pipeline.run(loaded, folder, _progress(quiet))
    _show(result, _run_summary, json_)
    if not result.passed:
        failed = sum(not gate.passed for gate in result.gates)
        raise GateError(f"{failed} of {len(result.gates)} gates failed")


def validate(recipe: o.RecipeFile, json_: o.Json = False) -> None:
    """Check a recipe and report all its faults."""
    from gblm_compress.recipe import find_recipe, load_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path)
    _show(loaded.model_dump(mode="json"), lambda content: f"{path}: valid", json_)


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from gblm_compress.recipe import schema

    print(json.dumps(schema(), indent=2))


def doctor(json_: o.Json = False) -> None:
    """Say what this machine has, and what each finding enables."""
    from dataclasses import asdict

    from gblm_compress.doctor import diagnose

    findings = [asdict(finding) for finding in diagnose()]
    _show({"findings": findings, "ok": all(f["ok"] for f in findings)}, _doctor_summary, json_)


COMMANDS = (prune, export, evaluate, compare, benchmark, inspect, run, validate, schema, doctor)


def _progress(quiet: bool) -> Progress:
    from gblm_compress.sources import silence_libraries

    silence_libraries()
    return Progress(quiet)


def _start(model: str, quiet: bool) -> tuple[Any, Progress]:
    from gblm_compress.sources import resolve_model

    progress = _progress(quiet)
    return resolve_model(model, progress), progress


def _show(content: Any, summary: Any, as_json: bool) -> None:
    """Print a result: one JSON document, or a summary for people."""
    if as_json:
        print(json.dumps(content if isinstance(content, dict) else content.as_dict(), indent=2))
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_FILES)
    parts = summary(content)
    for part in parts if isinstance(parts, list) else [parts]:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _prune_summary(result: dict[str, Any]) -> list[Any]:
    from gblm_compress.report import human_bytes

    layers, weights, nonzeros = result["layers"], result["weights"], result["nonzeros"]
    patterns = ", ".join(sorted({layer["pattern"] for layer in layers.values()}))
    return [
        _pairs(
            [
                ("pruned layers", str(len(layers))),
                ("pattern", f"{patterns}, verified on disk"),
                ("nonzeros", f"{nonzeros:,} of {weights:,} ({100 * nonzeros / weights:.2f} %)"),
                ("time", f"{result['seconds']:.1f} s"),
                ("peak memory", human_bytes(result["peak_memory_bytes"])),
                ("written to", result["folder"]),
            ]
        ),
        *(f"note: {warning}" for warning in result["warnings"]),
    ]


def _export_summary(result: dict[str, Any]) -> Table:
    from gblm_compress.report import human_bytes

    size = f"{human_bytes(result['bytes'])} (source {human_bytes(result['source_bytes'])})"
    checks = [(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
              for name, value in result["checks"].items()]  # fmt: skip
    return _pairs(
        [
            ("format", result["format"]),
            ("size", size),
            *checks,
            ("time", f"{result['seconds']:.1f} s"),
            ("written to", result["folder"]),
        ]
    )


def _evaluate_summary(result: dict[str, Any]) -> list[Any]:
    error = result["perplexity_error"]
    rows = [
        ("perplexity", f"{result['perplexity']:.3f}" + (f" ± {error:.3f}" if error is not None else "")),
        ("text", f"{result['dataset']}: {result['windows']} windows of {result['sequence_length']} tokens"),
        ("computed in", f"{result['dtype']} on {result['provider']}"),
    ]
    if result["fidelity"] is not None:
        rows[1:1] = [
            ("perplexity, dense", f"{result['baseline_perplexity']:.3f}"),
            ("mean KL from dense", f"{result['fidelity']['mean_kl']:.4f} nats per token"),
            ("top-1 agreement", f"{100 * result['fidelity']['top1_agreement']:.2f} %"),
        ]
    return [_pairs(rows), *([_tasks_table(result["zero_shot"])] if result["zero_shot"] else [])]


def _tasks_table(zero_shot: dict[str, Any]) -> Table:
    table = Table("task", "metric")
    for name in ("questions", "accuracy", "dense", "recovery (95 %)"):
        table.add_column(name, justify="right")
    for t in zero_shot["tasks"]:
        error = "" if t["error"] is None else f" ± {t['error']:.3f}"
        dense = "" if t["dense_accuracy"] is None else f"{t['dense_accuracy']:.3f}"
        accuracy = f"{t['accuracy']:.3f}{error}"
        table.add_row(t["task"], t["metric"], str(t["questions"]), accuracy, dense, _recovery(t["recovery"]))
    table.add_row("mean", "", "", f"{zero_shot['mean_accuracy']:.3f}", "", _recovery(zero_shot["recovery"]))
    return table


def _recovery(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['ratio']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


def _compare_summary(result: dict[str, Any]) -> list[Any]:
    from gblm_compress.report import human_bytes

    table = Table("method", "pattern")
    for name in ("seeds", "perplexity", "KL from dense", "accuracy", "recovery", "time", "peak memory"):
        table.add_column(name, justify="right")
    for r in result["rows"]:
        table.add_row(
            r["method"],
            r["pattern"],
            str(r["seeds"]),
            _with_error(r["perplexity"], r["perplexity_error"], 2),
            _with_error(r["mean_kl"], r["mean_kl_error"], 3),
            "" if r["accuracy"] is None else f"{r['accuracy']:.3f}",
            "" if r["recovery"] is None else f"{r['recovery']:.3f}",
            f"{r['seconds']:.0f} s",
            human_bytes(r["peak_memory_bytes"]),
        )
    return [table, f"dense: perplexity {result['dense_perplexity']:.2f}", f"plot: {result['plot']}"]


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


_PRODUCT = re.compile("MatMul|Gemm|Linear")


def _benchmark_summary(result: dict[str, Any]) -> list[Any]:
    from gblm_compress.report import human_bytes

    table = Table("model", "runtime")
    for name in ("batch", "TTFT ms (p10–p90)", "TPOT ms (p10–p90)", "tokens/s", "peak", "load s", "on disk"):
        table.add_column(name, justify="right")
    table.add_column("prefill")
    table.add_column("decode")
    for m in result["measurements"]:
        table.add_row(
            m["model"],
            f"{m['runtime']} {m['dtype']} ({m['provider']})",
            str(m["batch"]),
            _spread(m["ttft_ms"]),
            _spread(m["tpot_ms"]),
            f"{m['tokens_per_second']:.1f}",
            human_bytes(m["peak_memory_bytes"]),
            f"{m['load_seconds']:.1f}",
            human_bytes(m["bytes_on_disk"]),
            m["prefill_speedup"]["verdict"] if m["prefill_speedup"] else "baseline",
            m["decode_speedup"]["verdict"] if m["decode_speedup"] else "baseline",
        )
    machine = result["environment"]
    return [
        table,
        *_kernel_lines(result["measurements"]),
        f"{machine['cpu']}, {machine['threads']} threads, device {machine['device']}",
    ]


def _kernel_lines(measurements: list[dict[str, Any]]) -> list[str]:
    """What each model ran, with the batch sizes that it ran it for."""
    batches: dict[str, list[str]] = {}
    for m in measurements:
        prefill, decode = _products(m["prefill_kernels"]), _products(m["decode_kernels"])
        both = f"prefill on {prefill}; decode on {decode}" if prefill != decode else f"prefill and decode on {decode}"
        batches.setdefault(f"{m['model']}: {both}", []).append(str(m["batch"]))
    return [f"{line} (batch {', '.join(of)})" for line, of in batches.items()]


def _products(kernels: dict[str, int]) -> str:
    """The kernels that multiply by weights; what else a graph has is in the JSON."""
    products = {name: n for name, n in kernels.items() if not name.endswith("Provider)") or _PRODUCT.search(name)}
    return ", ".join(f"{n} × {name}" for name, n in products.items())


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['p10']:.1f}–{spread['p90']:.1f})"


def _inspect_summary(result: dict[str, Any]) -> list[Any]:
    table = Table("layer", "shape")
    for name in ("nonzero", "empty rows", "empty columns", "row spread", "column spread"):
        table.add_column(name, justify="right")
    table.add_column("patterns that hold")
    for layer in result["layers"]:
        rows, columns = layer["shape"]
        table.add_row(
            layer["name"],
            f"{rows}×{columns}",
            f"{100 * layer['nonzeros'] / (rows * columns):.2f} %",
            str(layer["empty_rows"]),
            str(layer["empty_columns"]),
            f"{layer['row_spread']:.3f}",
            f"{layer['column_spread']:.3f}",
            ", ".join(layer["patterns"]) or "none",
        )
    share = 100 * result["nonzeros"] / result["weights"]
    total = f"{result['nonzeros']:,} of {result['weights']:,} weights are nonzero ({share:.2f} %)"
    return [table, total, f"heat map: {result['heat_map']}"]


def _plan_summary(content: dict[str, Any]) -> list[Any]:
    return [f"{i}. {step}" for i, step in enumerate(content["steps"], 1)] + [f"output: {content['output']}"]


def _run_summary(result: Any) -> list[Any]:
    from gblm_compress import report

    parts: list[Any] = [report.table(result.rows)]
    if result.gates:
        parts.append(report.gate_table(result.gates))
    if result.comparison:
        parts += _compare_summary(result.comparison)
    reused = [stage.name for stage in result.stages if stage.reused]
    if reused:
        parts.append("reused: " + ", ".join(reused))
    output = Path(result.output)
    parts += [f"artefacts: {output}", f"report: {output / report.REPORT} (and {report.PAGE} for people)"]
    return parts


def _doctor_summary(content: dict[str, Any]) -> Table:
    table = Table("", "found", "enables")
    for finding in content["findings"]:
        mark = "" if finding["ok"] else "[bold red]!![/] "
        table.add_row(finding["subject"], mark + finding["found"], finding["enables"])
    return table
