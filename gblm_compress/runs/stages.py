"""The stages of a run, as a list made from the recipe."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gblm_compress import errors, exporters
from gblm_compress.calibration import generation
from gblm_compress.errors import GblmError, UsageError
from gblm_compress.exporters import check_grid, export
from gblm_compress.formats import FOLDER_RUNTIMES, FORMATS
from gblm_compress.layouts import LAYOUTS
from gblm_compress.machine import environment
from gblm_compress.measure import evaluation, zero_shot
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.onnx_runtime import check_onnx_provider
from gblm_compress.measure.runtimes import check_installed
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.planning import Size
from gblm_compress.pruning.stage import PruneJob, prune
from gblm_compress.runs import comparison
from gblm_compress.runs.job import Disk, Job, Look, Stage
from gblm_compress.settings import (
    GATES,
    BenchmarkSettings,
    CompareSettings,
    ComputeSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    PruneSettings,
    RecoverSettings,
)
from gblm_compress.training.recovery import Recovery, check_kind, checkpoint_bytes, recover


def stages_of(job: Job) -> list[Stage]:
    recipe = job.recipe
    stages = [_generate(job, recipe.generate)] if recipe.generate else []
    stages.append(_prune(job))
    if job.recover is not None:
        stages.append(_recover(job, job.recover))
    stages += [_export(job, settings) for settings in recipe.export]
    stages += [_export(job, settings, of_dense=True) for settings in timed_against(job)]
    if recipe.evaluate is not None:
        stages.append(_evaluate(job, job.pruned, recipe.evaluate, "torch"))
        for settings in filter(job.can_run, recipe.export):
            stages.append(
                _evaluate(job, job.artefact(settings.folder_name), recipe.evaluate, FORMATS[settings.format].runtime)
            )
    if recipe.benchmark is not None:
        stages.append(_benchmark(job, recipe.benchmark))
    if recipe.compare is not None and recipe.evaluate is not None:
        stages.append(_compare(job, recipe.compare, recipe.evaluate))
    return stages


def exports_of_dense(job: Job) -> list[ModelSource]:
    return [job.artefact(f"dense-{settings.folder_name}") for settings in timed_against(job)]


def timed_against(job: Job) -> list[ExportSettings]:
    """The exports of the dense model for the benchmark: one for each timed format and dtype.

    The dense export computes as the pruned one does: in float32 on float16 weights where `kernels` do. With 8 or 4
    bits it uses ONNX Runtime's own operators.
    """
    recipe = job.recipe
    timed = set(recipe.benchmark.runtimes) - set(FOLDER_RUNTIMES) if recipe.benchmark is not None else set()
    found = []
    for settings in filter(job.can_run, recipe.export):
        if timed & set(FORMATS[settings.format].runtimes):
            known = job.here or settings.dtype != "auto"
            half = settings.kernels and known and exporters.dtype_of(job.dense, settings) == "float16"
            stored = {"dtype": settings.dtype, "kernels": half, "quantise": settings.quantise}
            found.append(ExportSettings(format=settings.format, **stored))
    return list(dict.fromkeys(found))


def _generate(job: Job, settings: GenerateSettings) -> Stage:
    texts = () if settings.starts is None else (settings.starts,)

    def check(progress: Progress) -> list[GblmError]:
        return generation.check(job.dense, settings) if job.here else errors.collect(job.looks_at(texts))

    def work(progress: Progress) -> object:
        return generation.generate(job.dense, job.written, settings, job.device, progress, force=True)

    return Stage(
        name="generate",
        does=f"let {job.dense.name} write {settings.tokens:,} tokens",
        home=job.output,
        reads=(job.dense,),
        texts=texts,
        decides=lambda: [settings, job.device],
        place=job.written,
        check=check,
        work=work,
    )


def _prune(job: Job) -> Stage:
    settings, text = job.recipe.prune, job.calibration
    texts = (text.dataset,) if settings.needs_text else ()

    def check(progress: Progress) -> list[GblmError]:
        length = text.sequence_length if settings.needs_text else 0
        return errors.collect([*job.looks_at(texts, length, "calibration.sequence_length"), lambda: job.patterns])

    def disk() -> Disk:
        size = Size(job.dense, loading.choose_dtype(job.dtype, job.dense, job.device), settings, text)
        return Disk(size.checkpoint, size.kept(settings))

    def work(progress: Progress) -> object:
        compute = ComputeSettings(dtype=job.dtype, device=job.device)
        what = PruneJob(job.dense, settings, text, compute, job.recipe.resources)
        return prune(what, job.as_pruned.folder, progress, resume=None, force=True)

    return Stage(
        name="prune",
        does=f"prune {job.dense.name} by {settings.method}, {settings.pattern}",
        home=job.output,
        reads=(job.dense,),
        texts=texts,
        decides=lambda: [settings, text if settings.needs_text else None, job.dtype, job.device],
        place=job.as_pruned.folder,
        check=check,
        disk=disk,
        work=work,
    )


def _recover(job: Job, settings: RecoverSettings) -> Stage:
    def check(progress: Progress) -> list[GblmError]:
        looks = job.looks_at(settings.datasets, settings.sequence_length, "recover.sequence_length")
        if job.here:
            looks.append(partial(check_kind, job.dense))
        return errors.collect(looks)

    def work(progress: Progress) -> object:
        what = Recovery(job.as_pruned, job.dense, job.pruned.folder, settings, job.device, force=True)
        return recover(what, progress, resume=None)

    return Stage(
        name="recover",
        does=f"train the pruned model on {settings.tokens:,} tokens",
        home=job.output,
        reads=(job.as_pruned, job.dense),
        texts=settings.datasets,
        decides=lambda: [settings, job.device],
        place=job.pruned.folder,
        check=check,
        disk=lambda: Disk(job.dense.bytes_on_disk, meanwhile=checkpoint_bytes(job.dense)),
        work=work,
    )


def _export(job: Job, settings: ExportSettings, of_dense: bool = False) -> Stage:
    source = job.dense if of_dense else job.pruned
    artefact = job.artefact(f"dense-{settings.folder_name}" if of_dense else settings.folder_name)
    what = f"{settings.format} ({settings.dtype})"

    def check(progress: Progress) -> list[GblmError]:
        unfit = errors.collect([lambda: job.patterns])  # a fault of the pruning stage
        patterns = {} if unfit or of_dense else job.patterns
        looks: list[Look] = [partial(exporters.check, job.dense if job.here else None, settings, patterns)]
        looks.append(partial(_check_allocation, job.recipe.prune, settings, patterns))
        if job.recipe.prune.grid is not None and not of_dense:
            looks.append(partial(check_grid, job.recipe.prune.columns_of_a_scale, settings))
        return errors.collect(looks)

    def disk() -> Disk:
        size = job.bytes_in(exporters.dtype_of(job.dense, settings))
        return Disk(size, meanwhile=FORMATS[settings.format].copies * size)

    return Stage(
        name=f"export {artefact.name}",
        does=f"export the dense model to {what}, the baseline of the benchmark" if of_dense else f"export to {what}",
        home=job.output,
        reads=(source,),
        decides=lambda: [settings],
        place=artefact.folder,
        check=check,
        disk=disk,
        work=lambda progress: export(source, artefact.folder, settings, force=True, progress=progress),
    )


def _check_allocation(prune: PruneSettings, settings: ExportSettings, patterns: Mapping[str, Pattern]) -> None:
    """Refuse a layout that needs a pattern where the allocation may give layers another one than `patterns` says."""
    layout = LAYOUTS.get(FORMATS[settings.format].layout or "")
    if layout and layout.pattern and any(prune.may_move(name, pattern) for name, pattern in patterns.items()):
        raise UsageError(
            f"allocation {prune.allocation} moves N of {prune.pattern}; export to {settings.format} needs "
            f"{layout.pattern}: give allocation uniform"
        )


def _evaluate(job: Job, source: ModelSource, asked: EvaluateSettings, runtime: str) -> Stage:
    """Evaluate the pruned model or an export of it. Only torch answers tasks."""
    settings = asked if runtime == "torch" else asked.model_copy(update={"tasks": ()})

    def check(progress: Progress) -> list[GblmError]:
        if runtime == "onnxruntime":
            return errors.collect([partial(check_onnx_provider, job.device)])
        if source is not job.pruned:
            return []
        found = evaluation.check([job.dense] if job.here else [], settings, progress)
        return found + errors.collect([partial(_check_evaluated, job)])

    def disk() -> Disk:
        """The dense model's logits, which are removed when the run ends."""
        room, windows = job.reference.room, settings.max_windows
        if windows is None:  # as many as the text has
            return Disk(meanwhile=room)
        config, length = loading.config_of(job.dense), settings.sequence_length
        return Disk(meanwhile=min(room, 4 * windows * loading.task_of(job.dense).judged_values(config, length)))

    def work(progress: Progress) -> object:
        dense, dtype, device = job.reference, job.dtype, job.device
        return evaluate(source, settings, baseline=dense, dtype=dtype, device=device, progress=progress)

    fingerprint = partial(zero_shot.fingerprint, settings.tasks, settings.include_path)
    by = f" and by {', '.join(settings.tasks)}" if settings.tasks else ""
    return Stage(
        name=f"evaluate {source.name}",
        does=f"evaluate {source.name} on {settings.dataset}{by}",
        home=job.output,
        reads=(job.dense, source),
        texts=(settings.dataset,),
        decides=lambda: [settings, fingerprint(), job.dtype, job.device],
        check=check,
        disk=disk,
        work=work,
    )


def _check_evaluated(job: Job) -> None:
    without = {settings.folder_name for settings in job.recipe.export if not job.can_run(settings)}
    for gates in job.recipe.gates:
        if gates.artefact in without and any(GATES[name].needs == "evaluate" for name in gates.limits):
            raise UsageError(f"gates.artefact {gates.artefact!r} is not evaluated on {job.device}; set model.device")


def _benchmark(job: Job, settings: BenchmarkSettings) -> Stage:
    models = [job.pruned, *(job.artefact(each.folder_name) for each in filter(job.can_run, job.recipe.export))]
    baselines = [job.dense, *exports_of_dense(job)]

    def check(progress: Progress) -> list[GblmError]:
        length = settings.prompt + settings.generate
        looks = job.looks_at((), length, "benchmark.prompt plus generate")
        return errors.collect([*looks, partial(_check_runtimes, job, settings), partial(_check_timed, job, settings)])

    def work(progress: Progress) -> object:
        return benchmark(models, baselines, settings, dtype=job.dtype, device=job.device, progress=progress)

    return Stage(
        name="benchmark",
        does=f"benchmark in {' and '.join(settings.runtimes)}",
        home=job.output,
        reads=(*baselines, *models),
        decides=lambda: [settings, job.dtype, job.device, environment()],
        check=check,
        work=work,
    )


def _check_runtimes(job: Job, settings: BenchmarkSettings) -> None:
    able = [FORMATS[each.format].runtimes for each in filter(job.can_run, job.recipe.export)]
    if not (timed := set(FOLDER_RUNTIMES).union(*able).intersection(settings.runtimes)):
        raise UsageError(
            f"benchmark.runtimes is {' and '.join(settings.runtimes)} alone, and no export runs in it on {job.device}: "
            "nothing would be timed; name other runtimes, or another model.device"
        )
    for runtime in timed:
        check_installed(runtime)
    if timed - set(FOLDER_RUNTIMES):
        check_onnx_provider(job.device)


def _check_timed(job: Job, settings: BenchmarkSettings) -> None:
    exports = {each.folder_name: each for each in job.recipe.export}
    for gates in job.recipe.gates:
        if not any(GATES[name].needs == "benchmark" for name in gates.limits):
            continue
        named = f"gates.artefact {gates.artefact!r}"
        if made := exports.get(gates.artefact or ""):
            if not set(FORMATS[made.format].runtimes) & set(settings.runtimes):
                raise UsageError(f"{named} runs in {FORMATS[made.format].runtime}, which is not timed")
            if not job.can_run(made):
                raise UsageError(f"{named} is not timed on {job.device}; set model.device")
        if gates.artefact == job.pruned.name and not set(FOLDER_RUNTIMES) & set(settings.runtimes):
            raise UsageError(f"{named} runs in {' and '.join(FOLDER_RUNTIMES)}, which are not timed")


def _compare(job: Job, settings: CompareSettings, asked: EvaluateSettings) -> Stage:
    """The stage has no record: its cells have."""
    grid = comparison.Grid(settings, job.calibration, asked, job.dtype, job.device)
    home: Path = job.output / "comparison"
    cells = grid.stages(job.reference, home)

    def check(progress: Progress) -> list[GblmError]:
        given = job.is_given(job.calibration.dataset)
        return comparison.check(job.dense, grid, progress, text_is_given=given) if job.here else []

    def disk() -> Disk:
        """The largest pruned model, removed after its evaluation."""
        dtype = loading.choose_dtype(job.dtype, job.dense, job.device)
        sizes = [(Size(job.dense, dtype, method, job.calibration), method) for method in grid.methods()]
        return Disk(meanwhile=max(size.checkpoint + size.kept(method) for size, method in sizes))

    return Stage(
        name="compare",
        does=f"compare {len(settings.methods)} methods, {len(settings.patterns)} patterns, {settings.seeds} seeds",
        home=home,
        decides=list,
        check=check,
        disk=disk,
        work=lambda progress: comparison.compare(job.reference, home, grid, progress=progress),
        cells=tuple(cells),
    )
