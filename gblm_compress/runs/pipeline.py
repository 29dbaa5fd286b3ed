"""The run of a recipe: prune → export → evaluate → benchmark → gates, reusing what is already done."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gblm_compress import faults
from gblm_compress.errors import GblmError
from gblm_compress.exporters import export
from gblm_compress.machine.environment import environment
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.measure.evaluation import evaluate, prepare
from gblm_compress.models import loading
from gblm_compress.models.finding import resolve_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune
from gblm_compress.runs import report
from gblm_compress.runs.checks import check, check_model
from gblm_compress.runs.comparison import compare
from gblm_compress.runs.gates import GateOutcome, check_gates
from gblm_compress.runs.stages import Stage, evaluation_hash, run_stage, text_hash
from gblm_compress.settings import EvaluateSettings, ExportSettings, Recipe
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
    stages: list[Stage]
    rows: list[report.Row]
    gates: list[GateOutcome] = field(default_factory=list)
    comparison: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


def plan(recipe: Recipe) -> list[str]:
    """The stages that a run of the recipe consists of, in words."""
    steps = [f"prune {recipe.model.source} by {recipe.prune.method}, {recipe.prune.pattern}"]
    for settings in recipe.export:
        steps.append(f"export to {settings.format} ({settings.dtype})")
    for settings in _dense_exports(recipe):
        steps.append(f"export the dense model to {settings.format} ({settings.dtype}), the baseline of the benchmark")
    if recipe.evaluate:
        steps.append(f"evaluate on {recipe.evaluate.dataset}")
        if recipe.evaluate.tasks:
            onnx = any(settings.format == "onnx" for settings in recipe.export)
            steps[-1] += f" and by {', '.join(recipe.evaluate.tasks)}" + (" (tasks in torch only)" if onnx else "")
    if recipe.benchmark:
        steps.append(f"benchmark in {' and '.join(recipe.benchmark.runtimes)}")
    if recipe.compare:
        grid = f"{len(recipe.compare.methods)} methods, {len(recipe.compare.patterns)} patterns"
        steps.append(f"compare {grid}, {recipe.compare.seeds} seeds")
    gates = recipe.gates.model_dump(exclude_none=True)
    if gates:
        steps.append("check gates: " + ", ".join(f"{name} {value}" for name, value in gates.items()))
    return steps


def check_output(recipe: Recipe, output: Path) -> list[GblmError]:
    """What is in the way of a run: another folder than of a run, or in one a foreign file where a stage will write."""
    names = ["pruned", *(s.folder_name for s in recipe.export), *map(_dense_name, _dense_exports(recipe))]
    return faults.collect([partial(outputs.check_workable, output, "run")]) or faults.collect(
        partial(outputs.check_output, output / name, force=True) for name in names
    )


def run(recipe: Recipe, output: Path, progress: Progress) -> RunReport:
    """Carry out a recipe and write artefacts and `report.json` to `output`.

    Raises:
        GblmError: all that `check` finds, before anything is done; or of the stage that failed. A failed gate is no
            exception: see `RunReport.passed`.
    """
    faults.raise_all(check(recipe, progress) + check_output(recipe, output))
    dense = resolve_model(recipe.model.source, progress)
    faults.raise_all(check_model(recipe, dense, progress))  # of a model that was fetched or converted only now
    with outputs.working_in(output, "run"):
        return _run(recipe, dense, output, progress)


def _run(recipe: Recipe, dense: ModelSource, output: Path, progress: Progress) -> RunReport:
    stages: list[Stage] = []
    device, dtype = loading.choose_device(recipe.model.device), recipe.model.dtype
    if recipe.evaluate is not None:
        prepare(dense, recipe.evaluate, progress)

    def do(name: str, inputs: Any, work: Callable[[], Any], folder: Path | None = None) -> dict[str, Any]:
        stage = run_stage(output, name, inputs, work, folder, progress)
        stages.append(stage)
        return stage.result

    calibration = recipe.calibration if recipe.prune.needs_text else None
    text = text_hash(calibration.dataset) if calibration else None
    do(
        "prune",
        [dense.fingerprint, _dump(recipe.prune), _dump(calibration), text, dtype, device],
        lambda: prune(
            dense, output / "pruned", recipe.prune, recipe.calibration, resources=recipe.resources, resume=None,
            dtype=dtype, device=device, force=True, progress=progress,
        ),
        output / "pruned",
    )  # fmt: skip
    pruned = ModelSource("pruned", output / "pruned")

    def do_export(source: ModelSource, name: str, settings: ExportSettings) -> ModelSource:
        do(
            f"export {name}",
            [source.fingerprint, _dump(settings)],
            lambda: export(source, output / name, settings, force=True, progress=progress),
            output / name,
        )
        return ModelSource(name, output / name)

    exports = [do_export(pruned, settings.folder_name, settings) for settings in recipe.export]
    baselines = [dense] + [do_export(dense, _dense_name(settings), settings) for settings in _dense_exports(recipe)]
    models = [pruned] + [source for source in exports if not source.needs_cuda or "cuda" in device]
    evaluations: dict[str, dict[str, Any]] = {}
    if recipe.evaluate is not None:
        for source in models:
            settings = _measurable(recipe.evaluate, source)
            evaluations[source.name] = do(
                f"evaluate {source.name}",
                [dense.fingerprint, source.fingerprint, _dump(settings), evaluation_hash(settings), dtype, device],
                lambda source=source, settings=settings: evaluate(  # type: ignore[misc]
                    source, settings, baseline=dense, dtype=dtype, device=device,
                    progress=progress,
                ),
            )  # fmt: skip
    timings: list[dict[str, Any]] = []
    if recipe.benchmark is not None:
        bench = recipe.benchmark
        timings = do(
            "benchmark",
            [[s.fingerprint for s in (*baselines, *models)], _dump(bench), dtype, device, environment()],
            lambda: benchmark(models, baselines, bench, dtype=dtype, device=device, progress=progress),
        )["measurements"]
    comparison = None
    if recipe.compare is not None and recipe.evaluate is not None:
        folder, arguments = output / "comparison", (recipe.compare, recipe.calibration, recipe.evaluate)
        comparison = compare(dense, folder, *arguments, dtype=dtype, device=device, progress=progress).as_dict()
    result = RunReport(
        recipe=recipe.model_dump(mode="json"),
        output=str(output),
        environment=environment(),
        stages=stages,
        rows=report.rows(dense, pruned, exports, baselines, stages[0].result, evaluations, timings),
        comparison=comparison,
        gates=check_gates(recipe.gates, evaluations.get(pruned.name), timings),
    )
    report.write(result.as_dict(), output)
    return result


def _measurable(settings: EvaluateSettings, source: ModelSource) -> EvaluateSettings:
    """What of an evaluation a model's runtime can measure: lm-eval's tasks in torch only."""
    return settings.model_copy(update={"tasks": ()}) if source.is_onnx else settings


def _dense_exports(recipe: Recipe) -> list[ExportSettings]:
    """The exports of the dense model that the benchmark needs as baselines: one per dtype of the ONNX exports."""
    if recipe.benchmark is None or "onnxruntime" not in recipe.benchmark.runtimes:
        return []
    onnx = (settings for settings in recipe.export if settings.format == "onnx")
    return list(dict.fromkeys(settings.model_copy(update={"sparse": False, "kernels": False}) for settings in onnx))


def _dense_name(settings: ExportSettings) -> str:
    return f"dense-{settings.folder_name}"


def _dump(settings: Any) -> Any:
    return settings and settings.model_dump(mode="json")
