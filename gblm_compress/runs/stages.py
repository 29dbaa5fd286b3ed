"""The stages of a run, as a list made from the recipe."""

from collections.abc import Mapping
from functools import partial

from gblm_compress import errors, exporters
from gblm_compress.errors import UsageError, raise_all
from gblm_compress.exporters import check_grid, export
from gblm_compress.formats import FOLDER_RUNTIMES, FORMATS
from gblm_compress.layouts import LAYOUTS
from gblm_compress.machine import environment
from gblm_compress.measure import evaluation, zero_shot
from gblm_compress.measure.benchmarking import Contest, benchmark
from gblm_compress.measure.onnx_runtime import check_onnx_provider
from gblm_compress.measure.runtimes import check_installed
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.stage import PruneJob, prune
from gblm_compress.runs.job import Job, Look, Stage
from gblm_compress.settings import (
    GATES,
    BenchmarkSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
    RecoverSettings,
)
from gblm_compress.training.recovery import Recovery, check_kind, recover


def stages_of(job: Job) -> list[Stage]:
    recipe = job.recipe
    stages = [] if recipe.prune is None else [_prune(job, recipe.prune)]
    if job.recover is not None:
        stages.append(_recover(job, job.recover))
    stages += [_export(job, settings) for settings in job.exports]
    stages += [_export(job, settings, of_dense=True) for settings in timed_against(job)]
    if recipe.evaluate is not None:
        folder = [] if recipe.prune is None else [None]
        stages += [_evaluate(job, recipe.evaluate, settings) for settings in (*folder, *job.runnable)]
        rounded = [settings for settings in timed_against(job) if settings.quantise]
        stages += [_evaluate(job, recipe.evaluate, settings, of_dense=True) for settings in rounded]
    if job.benchmark is not None:
        stages.append(_benchmark(job, job.benchmark))
    return stages


def exports_of_dense(job: Job) -> list[ModelSource]:
    return [_exported(job, settings, of_dense=True) for settings in timed_against(job)]


def _exported(job: Job, settings: ExportSettings, of_dense: bool) -> ModelSource:
    return job.artefact(f"dense-{settings.folder_name}" if of_dense else settings.folder_name)


def timed_against(job: Job) -> list[ExportSettings]:
    """The exports of the dense model for the benchmark, one for each timed format and dtype.

    They compute like the artefacts: in float32 on float16 weights if `kernels` do so.
    """
    if job.benchmark is None:
        return []
    timed, found = set(job.benchmark.runtimes) - set(FOLDER_RUNTIMES), []
    for settings in job.runnable:
        if not timed & set(FORMATS[settings.format].runtimes):
            continue
        if settings.quantise and job.benchmark.float_baseline:
            dense = ExportSettings(format=settings.format)
            if job.found and exporters.dtype_of(job.dense, dense) != "float32":
                dense = ExportSettings(format=settings.format, dtype="float32")
        else:
            known = job.found or settings.dtype != "auto"
            half = settings.kernels and known and exporters.dtype_of(job.dense, settings) == "float16"
            stored = {"dtype": settings.dtype, "kernels": half, "quantise": settings.quantise}
            dense = ExportSettings(format=settings.format, **stored)
        found.append(dense)
    return list(dict.fromkeys(found))


def _prune(job: Job, settings: PruneSettings) -> Stage:
    text, place = job.recipe.calibration, job.as_pruned.folder
    texts, length = (text.datasets, text.sequence_length) if settings.needs_text else ((), 0)
    what = PruneJob(job.dense, settings, text, job.compute, job.recipe.resources)
    does = f"prune {job.dense.name} by {settings.method}, {settings.pattern}"
    return Stage(
        name="prune",
        does=f"round {job.dense.name} to {settings.quantise}" if settings.pattern == DENSE else does,
        reads=(job.dense,),
        texts=texts,
        decides=lambda: [settings, text if settings.needs_text else None, job.compute.dtype, job.device],
        place=place,
        looks=[*job.looks_at(texts, length, "calibration.sequence_length"), lambda: job.patterns],
        work=partial(prune, what, place, job.progress, resume=None, force=True),
    )


def _recover(job: Job, settings: RecoverSettings) -> Stage:
    looks = job.looks_at(settings.datasets, settings.sequence_length, "recover.sequence_length")
    what = Recovery(job.as_pruned, job.dense, job.exported.folder, settings, job.device, force=True)
    return Stage(
        name="recover",
        does=f"train the pruned model on {settings.tokens:,} tokens",
        reads=(job.as_pruned, job.dense),
        texts=settings.datasets,
        decides=lambda: [settings, job.device],
        place=job.exported.folder,
        looks=[*looks, partial(check_kind, job.dense, settings)] if job.found else looks,
        work=partial(recover, what, job.progress, resume=None),
    )


def _export(job: Job, settings: ExportSettings, of_dense: bool = False) -> Stage:
    source = job.dense if of_dense else job.exported
    artefact = _exported(job, settings, of_dense)

    def patterns() -> Mapping[str, Pattern]:
        unfit = errors.collect([lambda: job.patterns])  # a fault of the pruning stage
        return {} if unfit or of_dense else job.patterns

    looks: list[Look] = [lambda: exporters.check(job.found, settings, patterns())]
    if (pruning := job.recipe.prune) is not None and not of_dense:
        looks.append(lambda: _check_allocation(pruning, settings, patterns()))
        if pruning.grid is not None:
            looks.append(partial(check_grid, pruning.columns_of_a_scale, pruning.pattern == DENSE, settings))

    return Stage(
        name=f"export {artefact.name}",
        does=f"export the dense model to {settings.folder_name}, the baseline of the benchmark"
        if of_dense
        else f"export to {settings.folder_name}",
        reads=(source,),
        decides=lambda: [settings],
        place=artefact.folder,
        looks=looks,
        work=partial(export, source, artefact.folder, settings, force=True, progress=job.progress),
    )


def _check_allocation(prune: PruneSettings, settings: ExportSettings, patterns: Mapping[str, Pattern]) -> None:
    """Refuse a layout with a fixed pattern if the allocation may change the `patterns` of layers."""
    layout = LAYOUTS.get(FORMATS[settings.format].layout or "")
    if layout and layout.pattern and any(prune.may_move(name, pattern) for name, pattern in patterns.items()):
        raise UsageError(
            f"allocation {prune.allocation} changes N of {prune.pattern}, but export to {settings.format} needs "
            f"{layout.pattern}; give allocation uniform"
        )


def _evaluate(job: Job, asked: EvaluateSettings, export: ExportSettings | None, of_dense: bool = False) -> Stage:
    """Evaluate an export, or the pruned model if None. Only torch answers tasks."""
    source = job.exported if export is None else _exported(job, export, of_dense)
    in_torch = export is None or FORMATS[export.format].runtime == "torch"
    settings = asked if in_torch else asked.model_copy(update={"tasks": ()})
    looks: list[Look] = [] if in_torch else [partial(check_onnx_provider, job.device)]
    if source == job.measured[0]:  # once, for all evaluations
        models = [job.dense] if job.found else []
        looks.append(lambda: raise_all(evaluation.check(models, asked, job.progress)))

    shared = {"baseline": job.reference, "progress": job.progress, **job.compute.model_dump()}
    by = f" and by {', '.join(settings.tasks)}" if settings.tasks else ""
    return Stage(
        name=f"evaluate {source.name}",
        does=f"evaluate {source.name} on {settings.dataset}{by}",
        reads=(job.dense, source),
        texts=(settings.dataset,),
        decides=lambda: [settings, zero_shot.fingerprint(settings), job.compute.dtype, job.device],
        looks=looks,
        work=partial(evaluation.evaluate, source, settings, **shared),
    )


def _benchmark(job: Job, settings: BenchmarkSettings) -> Stage:
    baselines, length = [job.dense, *exports_of_dense(job)], settings.prompt + settings.generate
    return Stage(
        name="benchmark",
        does=f"benchmark in {' and '.join(settings.runtimes)}",
        reads=(*baselines, *job.measured),
        decides=lambda: [settings, job.compute.dtype, job.device, environment()],
        looks=[*job.looks_at((), length, "benchmark.prompt plus generate"), partial(_check_runtimes, job, settings)],
        work=partial(benchmark, Contest(job.measured, baselines, settings, job.compute), job.progress),
    )


def _check_runtimes(job: Job, settings: BenchmarkSettings) -> None:
    able = [FORMATS[each.format].runtimes for each in job.runnable]
    folder = set() if job.recipe.prune is None else set(FOLDER_RUNTIMES)
    if not (timed := folder.union(*able).intersection(settings.runtimes)):
        raise UsageError(
            f"no export runs in {' or '.join(settings.runtimes)} on {job.device}, so nothing would be timed; "
            "change benchmark.runtimes or model.device"
        )
    for runtime in timed:
        check_installed(runtime)
    if timed - set(FOLDER_RUNTIMES):
        check_onnx_provider(job.device)


def check_artefacts_of_gates(job: Job) -> None:
    """Refuse gates on an artefact that this machine makes under another name only, or cannot evaluate or time."""
    exports = {each.folder_name: each for each in job.exports}
    for gates in job.recipe.gates:
        if gates.artefact is None:
            continue
        named, made = f"gates.artefact {gates.artefact!r}", exports.get(gates.artefact)
        if not made and gates.artefact != job.exported.name:  # an export with kernels, where there are none
            raise UsageError(f"{named} is not made: {'; '.join(job.notes)}")
        runtimes = FORMATS[made.format].runtimes if made else ("torch",)
        needs = {GATES[name] for name in gates.limits}
        if "benchmark" in needs and job.benchmark and set(runtimes).isdisjoint(job.benchmark.runtimes):
            raise UsageError(
                f"{named} is not timed in {' or '.join(runtimes)}, where it runs; name one in benchmark.runtimes"
            )
        if made and made not in job.runnable and needs & {"evaluate", "benchmark"}:
            done = "evaluated" if "evaluate" in needs else "timed"
            raise UsageError(f"{named} is not {done} on {job.device}; set model.device")
