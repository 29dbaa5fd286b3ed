"""The run of a recipe: prune → export → evaluate → benchmark → gates, reusing what is already done."""

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from gblm_compress import errors
from gblm_compress.machine import environment
from gblm_compress.measure.evaluation import prepare
from gblm_compress.models.finding import find_here, resolve_model
from gblm_compress.progress import Progress
from gblm_compress.runs import conditions, report, reuse, summary
from gblm_compress.runs.artefacts import Export
from gblm_compress.runs.checks import check, check_model, check_output
from gblm_compress.runs.gates import check_gates
from gblm_compress.runs.job import Job, Recorded
from gblm_compress.runs.reuse import Outcome
from gblm_compress.runs.run_report import RunReport
from gblm_compress.runs.stages import Benchmark, Evaluate, stages_of
from gblm_compress.settings import Recipe
from gblm_compress.storage import outputs, records


def run(recipe: Recipe, output: Path, progress: Progress) -> RunReport:
    """Carry out a recipe and write artefacts and `report.json` to `output`.

    Raises:
        GblmError: all that `check` finds, before anything is done; or of the stage that failed. A failed gate is no
            exception: see `RunReport.passed`.
    """
    errors.raise_all(check(recipe, progress) + check_output(recipe, output))
    was_here = find_here(recipe.model.source) is not None
    dense = resolve_model(recipe.model.source, progress)
    if not was_here:
        errors.raise_all(check_model(recipe, dense, progress))
    job = Job(recipe, dense, True, output)
    with outputs.working_in(output, "run"), closing(job.reference):
        if recipe.evaluate is not None:
            prepare(dense, recipe.evaluate, progress)
        records.write_text(output / conditions.RECIPE, conditions.as_given(recipe))
        result = _carry_out(job, progress)
        report.write(result, output)
        return result


def _carry_out(job: Job, progress: Progress) -> RunReport:
    """Every stage in its order, and what they found together."""
    stages = stages_of(job)
    outcomes: dict[str, Outcome] = {}
    comparison = None
    for stage in stages:
        if isinstance(stage, Recorded):
            outcomes[stage.name] = reuse.carry_out(job.output, stage, progress)
        else:
            comparison = stage.work(progress)
    results = {name: outcome.result for name, outcome in outcomes.items()}
    evaluations = {stage.source.name: results[stage.name] for stage in stages if isinstance(stage, Evaluate)}
    timings = next((results[stage.name] for stage in stages if isinstance(stage, Benchmark)), None)
    measurements = timings["measurements"] if timings else []
    exports = [stage for stage in stages if isinstance(stage, Export)]
    of_pruned = [export.artefact for export in exports if not export.of_dense]
    baselines = [job.dense, *(export.artefact for export in exports if export.of_dense)]
    rows = summary.summarise(job.dense, job.pruned, of_pruned, baselines, results["prune"], evaluations, measurements)
    return RunReport(
        recipe=job.recipe.model_dump(mode="json"),
        output=str(job.output),
        environment=environment(),
        stages=list(outcomes.values()),
        rows=rows,
        comparison=comparison,
        gates=check_gates(job.recipe.gates, rows),
        model=job.recipe.model.source,
        method=conditions.method(job.recipe, results["prune"]),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        conditions=conditions.of(job.recipe, results["prune"], evaluations.get(job.pruned.name), timings),
        commands=conditions.commands(job),
        layers=summary.layers_of(results["prune"]["layers"]),
        recovery=summary.recovery_of(results.get("recover")),
    )
