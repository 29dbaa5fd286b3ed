"""The run of a recipe: its check, its preview and the run itself."""

import shlex
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from gblm_compress import errors, tasks
from gblm_compress.errors import GblmError, UsageError
from gblm_compress.machine import environment, noisy
from gblm_compress.measure.evaluation import samples_of
from gblm_compress.methods import patterns
from gblm_compress.models import loading
from gblm_compress.models.finding import find_here, resolve_model
from gblm_compress.models.manifest import is_pruned
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.runs import report, rows
from gblm_compress.runs.job import Job, carry_out
from gblm_compress.runs.rows import DENSE, Row, check_gates
from gblm_compress.runs.run_report import Outcome, RunReport
from gblm_compress.runs.stages import check_artefacts_of_gates, exports_of_dense, stages_of
from gblm_compress.settings import Recipe
from gblm_compress.storage import outputs, records

RECIPE = "recipe.json"
"""A run's recipe in its folder, with the changes of `--set`: JSON, which is YAML too."""
ANYWHERE = Path()  # checks do not depend on the folder


def check(recipe: Recipe, progress: Progress) -> list[GblmError]:
    """Every fault that can be found before a run. Nothing is fetched, converted or computed."""
    here: list[ModelSource | None] = []
    name, device = recipe.model.source, recipe.model.device
    found = errors.collect([lambda: here.append(find_here(name)), partial(loading.choose_device, device)])
    return found + check_model(recipe, here[0] if here else None, progress)


def check_model(recipe: Recipe, dense: ModelSource | None, progress: Progress) -> list[GblmError]:
    unusable = errors.collect([partial(_check_dense, recipe, dense)]) if dense else []
    job = Job(recipe, None if unusable else dense, ANYWHERE, progress)
    looks = [look for stage in stages_of(job) for look in stage.looks]
    found = unusable + errors.collect([*looks, partial(check_artefacts_of_gates, job)])
    return list({str(fault): fault for fault in found}.values())


def _check_dense(recipe: Recipe, dense: ModelSource) -> None:
    loading.check_model(dense, "export" if recipe.prune is None else "prune")
    if recipe.prune is None and is_pruned(dense.folder):
        raise UsageError(
            f"model {dense.name!r} is pruned, but it is the baseline when prune is null; give the dense model"
        )


def check_output(recipe: Recipe, output: Path) -> list[GblmError]:
    """Faults of the output folder, such as foreign files."""
    foreign = errors.collect([partial(outputs.check_workable, output, "run")])
    return foreign or errors.collect(stage.check_place for stage in stages_of(Job(recipe, None, output)))


def outlook(recipe: Recipe) -> dict[str, list[str]]:
    """The stages of a run, the notes on changed exports, and the inputs that `check` cannot see yet."""
    job = Job(recipe, find_here(recipe.model.source), ANYWHERE)
    stages = stages_of(job)
    datasets = dict.fromkeys(name for stage in stages for name in stage.texts)
    absent = [] if job.found else [f"model {recipe.model.source}"]
    absent += [f"dataset {name}" for name in datasets if not tasks.is_here(name)]
    return {"stages": [stage.does for stage in stages], "notes": job.notes, "unchecked": absent}


def run(recipe: Recipe, output: Path, progress: Progress) -> RunReport:
    """Check the run, then write artefacts and report to `output`. A failed gate raises nothing."""
    errors.raise_all(check(recipe, progress) + check_output(recipe, output))
    was_here = find_here(recipe.model.source) is not None
    dense = resolve_model(recipe.model.source, progress)
    if not was_here:
        errors.raise_all(check_model(recipe, dense, progress))
    job = Job(recipe, dense, output, progress)
    for note in job.notes:
        progress.say(f"note: {note}")
    with outputs.working_in(output, "run"), closing(job.reference):
        if recipe.evaluate is not None:
            samples_of(dense, recipe.evaluate, progress)
        records.write_file(output / RECIPE, records.as_json(recipe.model_dump(mode="json", exclude_unset=True)))
        result = _report(job, [carry_out(stage, output, progress) for stage in stages_of(job)])
        report.write(result, output)
        return result


def _report(job: Job, outcomes: list[Outcome]) -> RunReport:
    results = {outcome.name: outcome.result for outcome in outcomes}
    measured = _rows(job, results)
    recipe = job.output / RECIPE
    return RunReport(
        recipe=job.recipe.model_dump(mode="json"),
        output=str(job.output),
        environment=environment(),
        stages=outcomes,
        rows=measured,
        gates=check_gates(job.recipe.gates, measured),
        model=job.recipe.model.source,
        method=_method(job.recipe, results.get("prune", {})),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        conditions=_conditions(job, results),
        commands=[f"gblm-compress run {shlex.quote(str(recipe))} -o {shlex.quote(str(job.output))}"],
    )


def _rows(job: Job, results: dict[str, dict[str, Any]]) -> list[Row]:
    found: list[Row] = []
    pruned = results.get("prune", {})
    baselines = exports_of_dense(job)
    exports = [job.artefact(settings.folder_name) for settings in job.exports]
    timings = results.get("benchmark", {"measurements": []})["measurements"]
    evaluated = next((result for name, result in results.items() if name.startswith("evaluate ")), {})
    of_dense = {each: (evaluated[f"baseline_{each}"], None, None) for each in evaluated.get("metrics", ())}
    for source in sorted([job.dense, job.exported, *baselines, *exports], key=lambda source: source.is_onnx):
        dense = source is job.dense or source in baselines
        name = DENSE if source is job.dense else source.name
        seen, checks = results.get(f"evaluate {name}", {}), results.get(f"export {name}", {}).get("checks", {})
        own = {each: (seen[each], seen[f"{each}_error"], seen[f"baseline_{each}"]) for each in seen.get("metrics", ())}
        nonzeros = 1.0 if dense or not pruned else pruned["nonzeros"] / pruned["weights"]
        model = {
            "model": name,
            "dense": dense,
            "metrics": of_dense if source is job.dense else own,
            "fidelity": seen.get("fidelity") or {},
            "tasks": seen.get("zero_shot"),
            "nonzero_fraction": checks.get("nonzero_fraction", nonzeros),
            "bytes_on_disk": source.bytes_on_disk,
        }
        for timing in [each for each in timings if each["model"] == source.name] or [None]:
            found += rows.rows_of({**model, "timing": timing}, job.dense.bytes_on_disk)
    found += rows.layer_rows(job.as_pruned.name, pruned.get("layers", {}))
    if trained := results.get("recover"):
        found += rows.recovery_rows(job.exported.name, trained["curve"], trained["best"])
    return list(dict.fromkeys(found))


def _method(recipe: Recipe, pruned: dict[str, Any]) -> str:
    if recipe.prune is None:
        return "exports of the dense model"
    if recipe.prune.pattern == patterns.DENSE:
        return f"dense weights on {pruned['grid']}, fit {recipe.prune.fit}"
    zeros = 1 - pruned["nonzeros"] / pruned["weights"]
    pattern = "" if recipe.prune.pattern == "unstructured" else f", {recipe.prune.pattern}"
    fit = f", fit {recipe.prune.fit}" if recipe.prune.fit else ""
    grid = f", {pruned['grid']}" if pruned["grid"] else ""
    trained = ", recovered" if recipe.recover else ""
    return f"{100 * zeros:.0f} % zeros by {recipe.prune.method}{pattern}{fit}{grid}{trained}"


def _conditions(job: Job, results: dict[str, dict[str, Any]]) -> dict[str, str]:
    recipe, here, found = job.recipe, environment(), {}
    if recipe.prune is None:
        found["pruning"] = "none: the dense model is exported as it is, and is the baseline"
    elif recipe.prune.needs_text:
        text = recipe.calibration
        size = f"{text.samples} samples of {text.sequence_length} tokens"
        found["calibration"] = f"{text.name}: {size}, seed {text.seed}"
    if evaluation := results.get(f"evaluate {job.measured[0].name}"):
        size = f"{evaluation['windows']} {evaluation['sample']}s of at most {evaluation['sequence_length']} tokens"
        note = f" ({said})" if (said := evaluation.get("note")) else ""
        found["evaluation"] = f"{evaluation['dataset']}: {size}{note}"
    if settings := job.benchmark:
        if settings.float_baseline:
            found["baseline of speed"] = "the dense model in float32, also for exports in 8 and 4 bits"
        here = results["benchmark"]["environment"]
        found["timing"] = (
            f"a prompt of {settings.prompt} tokens, {settings.generate} generated; {settings.repeats} rounds after "
            f"{settings.warmup} warm-up rounds, models in turn"
        )
        threads = f"{here['threads']} thread{'s' if here['threads'] > 1 else ''}"
        found["machine"] = f"{here['cpu']}, {threads}, {here['device']}"
        if warning := noisy(here):
            found["warning"] = warning
    else:
        found["machine"] = here["cpu"]
    found["system"] = f"{here['system']}, {here['cores']} cores, Python {here['python']}"
    found["packages"] = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    if job.notes:
        found["kernels"] = "; ".join(job.notes)
    if notes := results.get("prune", {}).get("warnings"):
        found["note"] = "; ".join(notes)
    return found
