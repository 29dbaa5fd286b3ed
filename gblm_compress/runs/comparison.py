"""Pruning methods and patterns compared on one model: a grid with a cell for each method, pattern and seed.

Finished cells are saved and reused.
"""

import math
import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

from gblm_compress import errors
from gblm_compress.errors import UsageError, raise_all
from gblm_compress.machine import environment
from gblm_compress.measure import evaluation, zero_shot
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.planning import uniform_budgets
from gblm_compress.pruning.stage import PruneJob, prune
from gblm_compress.runs import charts
from gblm_compress.runs.job import Look, Stage, carry_out
from gblm_compress.runs.rows import Row
from gblm_compress.settings import CalibrationSettings, CompareSettings, ComputeSettings, EvaluateSettings
from gblm_compress.storage import outputs, records
from gblm_compress.tasks.metrics import mean_metric

REPORT, PLOT = "comparison.json", "comparison.png"


@dataclass(frozen=True)
class Cell(records.Result):
    """One method, pattern and seed. `seconds` include loading and saving; task figures are means."""

    method: str
    pattern: str
    seed: int
    perplexity: float
    dense_perplexity: float
    mean_kl: float
    top1_agreement: float
    accuracy: float | None
    recovery: float | None
    seconds: float


@dataclass(frozen=True)
class CompareResult(records.Result):
    """The whole grid, as in `comparison.json`. `rows` are the means over the seeds."""

    model: str
    dense_perplexity: float
    rows: list[dict[str, Any]]
    cells: list[Cell]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    plot: str = ""


@dataclass(frozen=True)
class Grid:
    """The compared methods, and the folder of their cells; seeds 0, 1, … replace the calibration's own."""

    dense: evaluation.Reference
    output: Path
    settings: CompareSettings
    calibration: CalibrationSettings
    evaluation: EvaluateSettings
    compute: ComputeSettings

    def stage(self, method: str, pattern: str, seed: int, progress: Progress) -> Stage:
        settings, text = self.settings.prune_settings(method, pattern), self.calibration
        text, asked, place = text.model_copy(update={"seed": seed}), self.evaluation, self.compute.model_dump()
        job = PruneJob(self.dense.source, settings, text, self.compute)

        def work() -> Cell:
            with tempfile.TemporaryDirectory(prefix=".cell-", dir=self.output) as folder:
                pruned = ModelSource(method, Path(folder) / "pruned")
                seconds = prune(job, pruned.folder, progress).seconds
                found = evaluation.evaluate(pruned, asked, baseline=self.dense, progress=progress, **place)
            assert found.baseline is not None and found.fidelity is not None
            tasks = found.zero_shot
            return Cell(
                method=method,
                pattern=pattern,
                seed=seed,
                perplexity=found.metrics["perplexity"].value,
                dense_perplexity=found.baseline["perplexity"].value,
                mean_kl=found.fidelity["mean_kl"],
                top1_agreement=found.fidelity["top1_agreement"],
                accuracy=tasks.mean_accuracy if tasks else None,
                recovery=tasks.recovery.ratio if tasks and tasks.recovery else None,
                seconds=seconds,
            )

        name = f"{method} {pattern} seed {seed}"
        return Stage(
            name=name,
            does=f"compare: {name}",
            reads=(self.dense.source,),
            texts=(*text.datasets, asked.dataset),
            decides=lambda: [settings, text, asked, zero_shot.fingerprint(asked), place["dtype"], place["device"]],
            work=work,
        )


def compare(grid: Grid, progress: Progress) -> CompareResult:
    output, source = grid.output, grid.dense.source
    with outputs.working_in(output, "comparison"), closing(grid.dense):
        check(grid, progress)
        evaluation.samples_of(source, grid.evaluation, progress)  # before the first pruning
        device = loading.choose_device(grid.compute.device)
        grid = replace(grid, compute=grid.compute.model_copy(update={"device": device}))
        places = product(grid.settings.patterns, grid.settings.methods, range(grid.settings.seeds))
        stages = [grid.stage(method, pattern, seed, progress) for pattern, method, seed in places]
        cells = [Cell(**carry_out(stage, output, progress).result) for stage in stages]
        result = CompareResult(
            model=source.name,
            dense_perplexity=cells[0].dense_perplexity,
            rows=summarise(cells),
            cells=cells,
            calibration=grid.calibration.model_dump(mode="json", exclude={"seed"}),
            evaluation=grid.evaluation.model_dump(mode="json"),
            environment=environment(),
            plot=str(output / PLOT),
        )
        points = []
        for mean in result.rows:
            figure, dense = partial(Row, mean["method"], part=mean["pattern"]), result.dense_perplexity
            perplexity = figure("perplexity", mean["perplexity"], error=mean["perplexity_error"], baseline=dense)
            points.append((figure("seconds", mean["seconds"]), perplexity))
        records.write_file(output / PLOT, charts.scatter(points, "seconds of pruning", "perplexity", log=True))
        records.write_file(output / REPORT, records.as_json(result.as_dict()))
        return result


def check(grid: Grid, progress: Progress) -> None:
    source, text, pairs = grid.dense.source, grid.calibration, product(grid.settings.patterns, grid.settings.methods)
    methods = [grid.settings.prune_settings(method, pattern) for pattern, method in pairs]
    loading.check_model(source, "compare")
    task = loading.task_of(source)
    if not task.generates:
        raise UsageError(f"compare measures perplexity, and {task.help} has none; prune and evaluate it")
    looks: list[Look] = [partial(loading.choose_device, grid.compute.device)]
    if any(method.needs_text for method in methods):
        looks += [partial(task.data_files, name) for name in text.datasets]
        looks.append(partial(loading.check_length, source, text.sequence_length))
    looks.append(lambda: raise_all(evaluation.check([source], grid.evaluation, progress)))
    raise_all(errors.collect(looks))
    skeleton = loading.load_skeleton(source)
    raise_all(errors.collect(partial(uniform_budgets, skeleton, method) for method in methods))


def summarise(cells: list[Cell]) -> list[dict[str, Any]]:
    """The means over the adjacent seeds of each method and pattern, with standard errors (None for one seed)."""
    result = []
    for (method, pattern), found in groupby(cells, lambda cell: (cell.method, cell.pattern)):
        group = list(found)
        summary: dict[str, Any] = {"method": method, "pattern": pattern, "seeds": len(group)}
        for name in ("perplexity", "mean_kl"):
            mean = mean_metric([getattr(cell, name) for cell in group])
            summary |= {name: mean.value, f"{name}_error": mean.error}
        for name in ("accuracy", "recovery", "seconds"):
            known = [value for cell in group if (value := getattr(cell, name)) is not None]
            summary[name] = math.fsum(known) / len(known) if known else None
        result.append(summary)
    return result
