"""A whole pruning: from a model source to a verified folder, resumable; or of a model in memory, in place."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gblm_compress import errors, tasks
from gblm_compress.calibration import generation, ranks
from gblm_compress.calibration.weights import ResidentWeights, StatePool, StreamedWeights, Weights, verify
from gblm_compress.errors import OutputError, UsageError, is_out_of_memory
from gblm_compress.machine.memory import free_memory, peak_memory
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.methods.zeros import check_finite, made_zero
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.experts import unfused
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import planning, saving
from gblm_compress.pruning.block_pruning import FEW_TOKENS, LayerResult
from gblm_compress.pruning.planning import Placement, Plan, PlanResult, Size, uniform_budgets
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.walk import LeftDense, Walk, Walked
from gblm_compress.settings import CalibrationSettings, ComputeSettings, PruneSettings, ResourceSettings
from gblm_compress.storage import outputs, records
from gblm_compress.tasks.task import Sample, fingerprint, on_device


@dataclass(frozen=True)
class PruneJob:
    source: ModelSource
    settings: PruneSettings
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)


@dataclass(frozen=True)
class PruneResult(records.Result):
    """Repeats on one machine, with one seed and number of threads, differ only in costs."""

    folder: str | None  # None if a model in memory was pruned in place
    layers: dict[str, LayerResult]
    left_dense: dict[str, LeftDense]  # all other linear weights of the model
    seconds: float
    peak_memory_bytes: int
    calibration_fingerprint: str | None
    grid: str | None  # in words; None if the survivors were not rounded
    warnings: tuple[str, ...]
    nonzeros: int
    weights: int  # of the layers
    linear_weights: int  # and of those left dense


_Done = tuple[Walked, int, str | None]  # bytes of memory at most, fingerprint of the samples


def prune(
    job: PruneJob, output: Path, progress: Progress, *, resume: bool | None = False, force: bool = False
) -> PruneResult:
    """Prune to a verified Hugging Face folder, which appears whole or not at all.

    `resume` continues an interrupted run; None continues one if it exists.
    """
    start, texts = time.perf_counter(), [job.source.folder, *tasks.files_of(*job.calibration.datasets)]
    with outputs.reserved(output, force, texts, ranks.is_first_started()):
        done = _to_folder(job, output, progress, resume, force)
    return _result(done, start, str(output), _pruned_before(job.source))


def prune_in_place(
    model: Any, processor: Any, settings: PruneSettings, calibration: CalibrationSettings, progress: Progress
) -> PruneResult:
    """Prune a transformers model on its device and in its dtype. It is put into eval mode.

    The processor is for calibration data, if the method needs them.
    """
    start, samples = time.perf_counter(), list[Sample]()
    model.eval()
    if settings.needs_text:
        task = tasks.task_of(type(model))
        if processor is None:
            raise UsageError(f"method {settings.method} reads data: give the {task.processor.name} of the model")
        task.check_processor(processor)
        errors.raise_all(errors.collect(partial(task.data_files, name) for name in calibration.datasets))
        if task.generates:
            loading.check_positions(type(model).__name__, model.config.to_dict(), calibration.sequence_length)
        samples = generation.calibration_in_place(model, processor, calibration, progress)
    own = [on_device(sample, model.device) for sample in samples]
    with peak_memory(str(model.device)) as memory, unfused(model):
        walked = prune_(model, own, settings, progress)
    return _result((walked, memory.peak_bytes, fingerprint(samples) if samples else None), start)


def _result(done: _Done, start: float, folder: str | None = None, notes: Sequence[str] = ()) -> PruneResult:
    walked, peak, read = done
    weights = sum(math.prod(layer.shape) for layer in walked.layers.values())
    return PruneResult(
        folder=folder,
        layers=walked.layers,
        left_dense=walked.left_dense,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak,
        calibration_fingerprint=read,
        grid=walked.plan.settings.grid,
        warnings=(*notes, *_notes(walked)),
        nonzeros=sum(layer.nonzeros for layer in walked.layers.values()),
        weights=weights,
        linear_weights=weights + sum(dense.weights for dense in walked.left_dense.values()),
    )


def _to_folder(job: PruneJob, output: Path, progress: Progress, resume: bool | None, force: bool) -> _Done:
    source, settings, calibration = job.source, job.settings, job.calibration
    budgets = _checked(job)
    device = ranks.device_of_rank(loading.choose_device(job.compute.device))
    processor = loading.load_processor(source)
    for note in _pruned_before(source):
        progress.say(f"note: {note}")
    given: dict[str, Any] = {
        "model": source.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "calibration": calibration.model_dump(mode="json") if settings.needs_text else {},
    }
    with peak_memory(device) as memory, ranks.joined(device, given) as group:
        plan, size, author = _planned(job, budgets, device, group, progress)
        samples: list[Sample] = []
        if settings.needs_text:
            writing = author.cost(calibration)
            if not progress.quiet:
                progress.say(planning.cost_of(source, plan, size, calibration, writing)[1])
            samples = author.calibration(processor, calibration)
            plan = replace(plan, samples=[on_device(sample, device) for sample in group.share(samples)])
        read = fingerprint(samples) if samples else None
        identity = given | {
            "calibration": {**given["calibration"], "fingerprint": read} if samples else None,
            "dtype": plan.dtype,
            "products": plan.products if settings.fits.fits_block else None,
            "device": plan.device.type,
        }
        run = RunFolder(output.with_name(f".{output.name}.pruning"), identity, resume, group)
        for name in run.damaged:
            progress.say(f"{name} of the interrupted run is damaged; its work is done again")
        with run.kept("finished blocks", resume, progress):
            needed = size.on_disk(settings, plan.placement, run.bytes)
            outputs.check_space(output.parent, needed, "the output, and for finished blocks until it is whole")
            place = "on disk, a block at a time in memory" if plan.placement.offload else "in memory"
            does = "resuming" if run.resumed else "pruning"
            progress.say(f"{does} {source.name} in {plan.dtype} on {device}, {place} …")
            walked, checkpoint = _walk(source, plan, run, progress)
            # The others are done. They do not wait for the first: it may save for longer than their timeout.
            if group.is_first:
                progress.say("saving …")
                with outputs.atomic_folder(output, force=force, inside=run.folder) as temporary:
                    layers = saving.save(temporary, source, checkpoint, processor, run, walked)
                    walked = replace(walked, layers=layers)
                    progress.say("verifying …")
                    verify(ModelSource(str(output), temporary), plan.placement.offload)
            run.remove()
    return walked, memory.peak_bytes, read


def plan(job: PruneJob, progress: Progress) -> PlanResult:
    """Predict a pruning by one process, from the headers of the weights."""
    device = loading.choose_device(job.compute.device)
    planned, size, author = _planned(job, _checked(job), device, ranks.Ranks(), progress)
    writing = author.cost(job.calibration) if job.settings.needs_text else (0.0, 0.0)
    return planning.cost_of(job.source, planned, size, job.calibration, writing)[0]


def _planned(
    job: PruneJob, budgets: dict[str, Budget], device: str, group: ranks.Ranks, progress: Progress
) -> tuple[Plan, Size, generation.Author]:
    """The plan without its samples, the sizes that decide the placement, and the reader or writer of the samples."""
    source, settings = job.source, job.settings
    dtype, products = planning.choose_dtypes(job.compute.dtype, source, settings, device, group)
    size = Size(source, dtype, settings, job.calibration)
    placement = planning.choose_placement(size, job.resources, settings, device, group)
    task, author = loading.task_of(source), generation.Author(source, device, placement.room, group, progress)
    return Plan(settings, task, [], budgets, torch.device(device), dtype, products, placement, group), size, author


def prune_(model: nn.Module, samples: Sequence[Sample], settings: PruneSettings, progress: Progress) -> Walked:
    """Prune a model in eval mode with unfused experts, in place, with samples of its task on its device."""
    for block in prunable_layers(model, settings.ignore):
        for name, layer in block.items():
            check_finite(name, "weights", weight_matrix(layer).detach())
    weights = ResidentWeights(model)
    device = next(model.parameters()).device
    dtype = str(model.dtype).removeprefix("torch.")
    planning.check_float16(dtype, settings, str(device))
    memory = free_memory("cpu")
    plan = Plan(
        settings=settings,
        task=tasks.task_of(type(model)),
        samples=samples,
        budgets=uniform_budgets(model, settings),
        device=device,
        dtype=dtype,
        products=ranks.faster_dtype(str(device), ranks.Ranks()),
        placement=Placement(offload=False, states=memory, by_sample=False),
        ranks=ranks.Ranks(),
    )
    with tempfile.TemporaryDirectory(prefix="gblm-") as folder:  # for gradients and pruned weights of blocks
        try:
            run = RunFolder(Path(folder) / "run", {}, resume=False, ranks=plan.ranks)
            return Walk(plan, weights, run, StatePool(run.states, memory, device), progress).prune_()
        except (OSError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise OutputError(
                f"{folder!r} cannot be written ({getattr(error, 'strerror', None) or error}); gradients and pruned "
                "weights are kept there meanwhile: make room, or name another folder in TMPDIR"
            ) from error


def _walk(source: ModelSource, plan: Plan, run: RunFolder, progress: Progress) -> tuple[Walked, Checkpoint]:
    """Prune every block and leave it finished in the run folder. The model is released at the end."""
    weights: Weights
    if plan.placement.offload:
        weights = StreamedWeights(source, loading.load_skeleton(source, plan.dtype), str(plan.device))
    else:
        weights = ResidentWeights(loading.load_model(source, plan.dtype, str(plan.device)))
    checkpoint = saving.stored(source, weights.model, plan.budgets)
    pool = StatePool(run.states, plan.placement.states, plan.device)
    return Walk(plan, weights, run, pool, progress).prune_(), checkpoint


def _checked(job: PruneJob) -> dict[str, Budget]:
    """The budgets of the layers; raises all reasons together why the run is impossible."""
    source, settings, calibration, budgets = job.source, job.settings, job.calibration, dict[str, Budget]()
    loading.check_model(source, "prune")
    looks: list[Callable[[], object]] = [
        lambda: planning.check_float16(job.compute.dtype, settings, loading.choose_device(job.compute.device)),
        lambda: budgets.update(uniform_budgets(loading.load_skeleton(source), settings)),
    ]
    if settings.needs_text:
        looks.append(partial(loading.check_length, source, calibration.sequence_length))
        looks += [partial(loading.task_of(source).data_files, name) for name in calibration.datasets]
    errors.raise_all(errors.collect(looks))
    return budgets


def _pruned_before(source: ModelSource) -> list[str]:
    if not manifest.is_pruned(source.folder):
        return []
    layers = manifest.read(source.folder).get("layers", {}).values()
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    zeros = 1 - sum(layer["nonzeros"] for layer in layers) / weights
    patterns = ", ".join(sorted({layer["pattern"] for layer in layers}))
    return [
        f"{source.name} is pruned already ({patterns}, {100 * zeros:.1f} % zeros); its zeros are the first to "
        "be pruned again: prune the dense model to change method or pattern"
    ]


def _notes(walked: Walked) -> Iterator[str]:
    settings, layers = walked.plan.settings, walked.layers
    if walked.whole:
        yield (
            "the blocks of this architecture repeat, share weights or pass on more than hidden states, so all "
            "layers were measured in the dense model at once"
        )
    if few := [name for name, layer in layers.items() if layer.by_magnitude]:
        yield (
            f"{len(few)} layers of experts got fewer than {FEW_TOKENS} tokens of the text and were pruned by "
            f"magnitude, first {few[0]} (more --samples reach more experts)"
        )
    survivors = {name: layer.survivors for name, layer in layers.items() if layer.pattern != DENSE}
    if gone := made_zero(survivors, {name: layers[name].nonzeros for name in survivors}):
        zeroed, worst, share = gone
        yield (
            f"{zeroed:,} of {sum(survivors.values()):,} survivors became zero by rounding, so fewer weights "
            f"are left than the budget allows; most in {worst} ({share:.1%} of its own)"
        )
    free = {name: layer.pattern for name, layer in layers.items()} | dict.fromkeys(walked.exceptions, DENSE)
    found = {pattern for name, pattern in free.items() if not settings.is_exception(name)}
    if found - {settings.pattern}:
        patterns = ", ".join(sorted(found, key=lambda name: -Pattern(name).sparsity(None)))
        yield (
            f"allocation {settings.allocation} gave layers the patterns {patterns}; give --allocation uniform to keep "
            f"{settings.pattern} everywhere"
        )
