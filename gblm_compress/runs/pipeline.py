"""The run of a recipe: prune → export → evaluate → benchmark → gates, reusing what is already done."""

from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gblm_compress import faults
from gblm_compress.machine.environment import environment
from gblm_compress.measure.evaluation import prepare
from gblm_compress.models.finding import find_here, resolve_model
from gblm_compress.progress import Progress
from gblm_compress.runs import report, reuse
from gblm_compress.runs.artefacts import Export
from gblm_compress.runs.checks import check, check_model, check_output
from gblm_compress.runs.gates import GateOutcome, check_gates
from gblm_compress.runs.job import Job, Recorded
from gblm_compress.runs.reuse import Outcome
from gblm_compress.runs.stages import Benchmark, Evaluate, stages_of
from gblm_compress.settings import Recipe
from gblm_compress.storage import outputs


@dataclass(frozen=True)
class RunReport:
    """Everything a run found out; `report.json` is this.

    Attributes:
        rows: the summary table, dense against pruned per runtime and batch size.
        gates: each gate with its limit and what was measured.
        comparison: the grid (`CompareResult` as plain values), when the recipe has one.
    """

    recipe: dict[str, Any]
    output: str
    environment: dict[str, Any]
    stages: list[Outcome]
    rows: list[report.ModelSummary]
    gates: list[GateOutcome] = field(default_factory=list)
    comparison: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


def run(recipe: Recipe, output: Path, progress: Progress) -> RunReport:
    """Carry out a recipe and write artefacts and `report.json` to `output`.

    Raises:
        GblmError: all that `check` finds, before anything is done; or of the stage that failed. A failed gate is no
            exception: see `RunReport.passed`.
    """
    faults.raise_all(check(recipe, progress) + check_output(recipe, output))
    was_here = find_here(recipe.model.source) is not None
    dense = resolve_model(recipe.model.source, progress)
    if not was_here:
        faults.raise_all(check_model(recipe, dense, progress))
    job = Job(recipe, dense, True, output)
    with outputs.working_in(output, "run"), closing(job.reference):
        if recipe.evaluate is not None:
            prepare(dense, recipe.evaluate, progress)
        result = _carry_out(job, progress)
        report.write(result.as_dict(), output)
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
            comparison = stage.work(progress).as_dict()
    results = {name: outcome.result for name, outcome in outcomes.items()}
    evaluations = {stage.source.name: results[stage.name] for stage in stages if isinstance(stage, Evaluate)}
    timings = [timing for s in stages if isinstance(s, Benchmark) for timing in results[s.name]["measurements"]]
    exports = [stage for stage in stages if isinstance(stage, Export)]
    of_pruned = [export.artefact for export in exports if not export.of_dense]
    baselines = [job.dense, *(export.artefact for export in exports if export.of_dense)]
    return RunReport(
        recipe=job.recipe.model_dump(mode="json"),
        output=str(job.output),
        environment=environment(),
        stages=list(outcomes.values()),
        rows=report.summarise(job.dense, job.pruned, of_pruned, baselines, results["prune"], evaluations, timings),
        comparison=comparison,
        gates=check_gates(job.recipe.gates, evaluations.get(job.pruned.name), timings),
    )
