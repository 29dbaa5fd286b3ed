"""The stages of a run, one list made from the recipe: `validate`, `run --dry-run`, `run` and the report read it.

A stage says in one place what it is called and does, what decides its outcome, what is in its way before any work, what
disk it takes, and does it. Those that write are in `artefacts`, those that measure here. What is reused is
in `reuse`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gblm_compress import errors
from gblm_compress.errors import GblmError, UsageError
from gblm_compress.exporters import dtype_of
from gblm_compress.formats import FOLDER_RUNTIMES, FORMATS
from gblm_compress.machine import environment
from gblm_compress.measure import evaluation, zero_shot
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.onnx_runtime import check_onnx_provider
from gblm_compress.measure.runtimes import check_installed
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.placement import Size
from gblm_compress.runs import comparison, grid
from gblm_compress.runs.artefacts import Export, Generate, Prune, Recover
from gblm_compress.runs.comparison import compare
from gblm_compress.runs.job import Disk, Job, Recorded, Stage, plain
from gblm_compress.settings import (
    GATES,
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    EvaluateSettings,
    ExportSettings,
)

Look = Callable[[], object]


@dataclass(frozen=True)
class Evaluate(Recorded):
    """Evaluate the pruned model or an export of it, held against the dense one.

    Attributes:
        runtime: what runs it.
        settings: without tasks outside torch, where alone lm-eval asks.
    """

    source: ModelSource
    runtime: str
    settings: EvaluateSettings

    @property
    def name(self) -> str:
        return f"evaluate {self.source.name}"

    @property
    def does(self) -> str:
        asked = f" and by {', '.join(self.settings.tasks)}" if self.settings.tasks else ""
        return f"evaluate {self.source.name} on {self.settings.dataset}{asked}"

    @property
    def reads(self) -> tuple[ModelSource, ...]:
        return (self.job.dense, self.source)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.settings.dataset,)

    def decides(self) -> list[Any]:
        tasks = zero_shot.fingerprint(self.settings.tasks, self.settings.include_path)
        return [plain(self.settings), tasks, self.job.dtype, self.job.device]

    def check(self, progress: Progress) -> list[GblmError]:
        """For an export, what the pruned model's evaluation does not show already."""
        if self.runtime == "onnxruntime":
            return errors.collect([partial(check_onnx_provider, self.job.device)])
        if self.source is not self.job.pruned:
            return []
        found = evaluation.check([self.job.dense] if self.job.here else [], self.settings, progress)
        return found + errors.collect([self._check_gates])

    def disk(self) -> Disk:
        """The logits of the dense model, which go when the run ends."""
        room, windows = self.job.reference.room, self.settings.max_windows
        if windows is None:  # as many as the text has
            return Disk(meanwhile=room)
        config, length = loading.config_of(self.job.dense), self.settings.sequence_length
        values = windows * loading.task_of(self.job.dense).judged_values(config, length)
        return Disk(meanwhile=min(room, 4 * values))

    def work(self, progress: Progress) -> Any:
        job = self.job
        dense, dtype, device = job.reference, job.dtype, job.device
        return evaluate(self.source, self.settings, baseline=dense, dtype=dtype, device=device, progress=progress)

    def _check_gates(self) -> None:
        """Raises:
        UsageError: the artefact that gates on quality name is not evaluated.
        """
        without = {s.folder_name for s in self.job.recipe.export if not self.job.can_run(s)}
        for gates in self.job.recipe.gates:
            if gates.artefact in without and any(GATES[name].needs == "evaluate" for name in gates.limits):
                raise UsageError(
                    f"gates.artefact {gates.artefact!r} is not evaluated on {self.job.device}; set model.device"
                )


@dataclass(frozen=True)
class Benchmark(Recorded):
    """Time the pruned model and its exports beside the dense one."""

    settings: BenchmarkSettings
    models: tuple[ModelSource, ...]
    baselines: tuple[ModelSource, ...]

    name = "benchmark"

    @property
    def does(self) -> str:
        return f"benchmark in {' and '.join(self.settings.runtimes)}"

    @property
    def reads(self) -> tuple[ModelSource, ...]:
        return (*self.baselines, *self.models)

    def decides(self) -> list[Any]:
        return [plain(self.settings), self.job.dtype, self.job.device, environment()]

    def check(self, progress: Progress) -> list[GblmError]:
        looks: list[Look] = [self._check_runtimes, self._check_gates]
        if self.job.here:
            length = self.settings.prompt + self.settings.generate
            looks.append(partial(loading.check_length, self.job.dense, length, "benchmark.prompt plus generate"))
        return errors.collect(looks)

    def work(self, progress: Progress) -> Any:
        job, models, baselines = self.job, list(self.models), list(self.baselines)
        return benchmark(models, baselines, self.settings, dtype=job.dtype, device=job.device, progress=progress)

    def _check_runtimes(self) -> None:
        """Raises:
        UsageError: nothing that the recipe makes is timed.
        MissingDependencyError: ONNX Runtime lacks the device.
        """
        able = filter(self.job.can_run, self.job.recipe.export)
        runtimes = set(FOLDER_RUNTIMES).union(*(FORMATS[settings.format].runtimes for settings in able))
        if not (timed := runtimes.intersection(self.settings.runtimes)):
            raise UsageError(
                f"benchmark.runtimes is {' and '.join(self.settings.runtimes)} alone, and no export runs in it on "
                f"{self.job.device}: nothing would be timed; name other runtimes, or another model.device"
            )
        for runtime in timed:
            check_installed(runtime)
        if timed - set(FOLDER_RUNTIMES):
            check_onnx_provider(self.job.device)

    def _check_gates(self) -> None:
        """Raises:
        UsageError: the artefact that gates name is not timed.
        """
        recipe = self.job.recipe
        exports = {settings.folder_name: Export(self.job, settings) for settings in recipe.export}
        for gates in recipe.gates:
            artefact = gates.artefact
            if not any(GATES[name].needs == "benchmark" for name in gates.limits):
                continue
            if export := exports.get(artefact or ""):
                if not set(export.format.runtimes) & set(self.settings.runtimes):
                    raise UsageError(f"gates.artefact {artefact!r} runs in {export.format.runtime}, which is not timed")
                if not self.job.can_run(export.settings):
                    raise UsageError(f"gates.artefact {artefact!r} is not timed on {self.job.device}; set model.device")
            if artefact == self.job.pruned.name and not set(FOLDER_RUNTIMES) & set(self.settings.runtimes):
                raise UsageError(
                    f"gates.artefact {artefact!r} runs in {' and '.join(FOLDER_RUNTIMES)}, which are not timed"
                )


@dataclass(frozen=True)
class Compare(Stage):
    """Compare methods, patterns and seeds. The cells of the grid have records, in its folder; it has none itself."""

    settings: CompareSettings
    calibration: CalibrationSettings
    evaluation: EvaluateSettings

    name = "compare"

    @property
    def does(self) -> str:
        grid = f"{len(self.settings.methods)} methods, {len(self.settings.patterns)} patterns"
        return f"compare {grid}, {self.settings.seeds} seeds"

    @property
    def home(self) -> Path:
        """The folder of its records, table and plot."""
        return self.job.output / "comparison"

    def cells(self) -> list[grid.CellStage]:
        """What it does, cell by cell."""
        job, settings = self.job, (self.settings, self.calibration, self.evaluation)
        return grid.stages_of(job.reference, self.home, *settings, job.dtype, job.device)

    def check(self, progress: Progress) -> list[GblmError]:
        if not self.job.here:
            return []
        given = self.job.is_given(self.calibration.dataset)
        what = self.job.dense, self.settings, self.calibration, self.evaluation
        return comparison.check(*what, progress, text_is_given=given)

    def disk(self) -> Disk:
        """The largest pruned model, which goes once it is evaluated."""
        dtype = loading.choose_dtype(self.job.dtype, self.job.dense, self.job.device)
        methods = {cell.settings for cell in self.cells()}
        sizes = [(Size(self.job.dense, dtype, method, self.calibration), method) for method in methods]
        return Disk(meanwhile=max(size.checkpoint + size.kept(method) for size, method in sizes))

    def work(self, progress: Progress) -> Any:
        job, settings = self.job, (self.settings, self.calibration, self.evaluation)
        return compare(job.reference, self.home, *settings, dtype=job.dtype, device=job.device, progress=progress)


def stages_of(job: Job) -> list[Stage]:
    """The stages of a run, in their order."""
    recipe = job.recipe
    exports = [Export(job, settings) for settings in recipe.export]
    baselines = [Export(job, settings, of_dense=True) for settings in _timed_against(job)]
    stages: list[Stage] = [Generate(job, recipe.generate)] if recipe.generate else []
    stages.append(Prune(job, recipe.prune, job.calibration))
    if job.recover is not None:
        stages.append(Recover(job, job.recover))
    stages += [*exports, *baselines]
    measured = [export for export in exports if job.can_run(export.settings)]
    if recipe.evaluate is not None:
        without_tasks = recipe.evaluate.model_copy(update={"tasks": ()})
        stages.append(Evaluate(job, job.pruned, "torch", recipe.evaluate))
        for export in measured:
            settings = recipe.evaluate if export.format.runtime == "torch" else without_tasks
            stages.append(Evaluate(job, export.artefact, export.format.runtime, settings))
    if recipe.benchmark is not None:
        models = (job.pruned, *(export.artefact for export in measured))
        dense = (job.dense, *(export.artefact for export in baselines))
        stages.append(Benchmark(job, recipe.benchmark, models, dense))
    if recipe.compare is not None and recipe.evaluate is not None:
        stages.append(Compare(job, recipe.compare, job.calibration, recipe.evaluate))
    return stages


def _timed_against(job: Job) -> list[ExportSettings]:
    """The exports of the dense model that the benchmark needs as baselines: one per format that is timed in a runtime
    of its own, and dtype, without the format's own options; but where `kernels` compute in float32 with weights of
    float16, so does the dense model, once it is here to say so, and where weights are levels of 8 or 4 bits, it is ONNX
    Runtime's own."""
    recipe = job.recipe
    timed = set(recipe.benchmark.runtimes) - set(FOLDER_RUNTIMES) if recipe.benchmark is not None else set()
    found = []
    for settings in recipe.export:
        if not timed & set(FORMATS[settings.format].runtimes) or not job.can_run(settings):
            continue
        known = job.here or settings.dtype != "auto"
        half = settings.kernels and known and dtype_of(job.dense, settings) == "float16"
        stored = {"dtype": settings.dtype, "kernels": half, "quantise": settings.quantise}
        found.append(ExportSettings(format=settings.format, **stored))
    return list(dict.fromkeys(found))
