"""The pruning stage: from a model source to a verified folder, resumable.

The walk over the blocks is in `walk.py`, what goes where is decided in `placement.py`; here is what surrounds them: the
folder of the run, and how the output is put together from the source and the finished blocks.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gblm_compress import __version__, errors, tasks
from gblm_compress.calibration import ranks
from gblm_compress.calibration.block_weights import ResidentWeights, StreamedWeights, Weights
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.calibration.products import dtype_for_fits, faster_dtype, with_fit_dtype
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import UsageError
from gblm_compress.machine.memory import peak_memory
from gblm_compress.methods.patterns import DENSE
from gblm_compress.models import loading
from gblm_compress.models.experts import experts_of, run_all_
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import run_folder, saving
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.budgeting import skeleton_budgets
from gblm_compress.pruning.notes import closing_notes, pruned_before
from gblm_compress.pruning.placement import Placement, Size, check_disk, choose_placement
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.saving import LeftDense, Walked, check_stored, checkpoint_of, left_dense_of
from gblm_compress.pruning.walk import Walk
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.storage import outputs
from gblm_compress.storage.resuming import kept_where_resuming_helps
from gblm_compress.tasks.task import Sample, on_device
from gblm_compress.tasks.task import fingerprint as fingerprint_of


@dataclass(frozen=True)
class PruneResult:
    """The outcome of the stage. Only the two measurements differ between runs with the same seed.

    Attributes:
        folder: what was written; None where a model in memory was pruned in place.
        layers: the pruned ones.
        left_dense: all other linear weights of the model, and why they were not pruned.
        grid: what the survivors were rounded to, in words; None if they were not.
    """

    folder: str | None
    layers: dict[str, LayerResult]
    left_dense: dict[str, LeftDense]
    seconds: float
    peak_memory_bytes: int
    calibration_fingerprint: str | None = None
    grid: str | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def nonzeros(self) -> int:
        """Nonzeros over all pruned layers."""
        return sum(layer.nonzeros for layer in self.layers.values())

    @property
    def weights(self) -> int:
        """Weights over all pruned layers, zeros included."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @property
    def linear_weights(self) -> int:
        """All linear weights of the model."""
        return self.weights + sum(dense.weights for dense in self.left_dense.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        totals = {"nonzeros": self.nonzeros, "weights": self.weights, "linear_weights": self.linear_weights}
        return {**asdict(self), **totals}


def prune(
    source: ModelSource,
    output: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    *,
    resources: ResourceSettings | None = None,
    resume: bool | None = False,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    progress: Progress,
) -> PruneResult:
    """Prune `source` and write an ordinary Hugging Face folder with a manifest, then reopen and verify it.

    Finished blocks are kept beside the output until it is whole. An interruption or a full disk leaves them there.

    Args:
        source: the dense model, never modified.
        output: the new folder; it appears whole or not at all.
        resources: how much memory to take, and whether the model stays on disk.
        resume: go on with an interrupted run; it must be one of the same settings. None: go on if it is.
        dtype: to compute in, see `ComputeSettings`; the folder keeps the checkpoint's own.
        device: where to compute.
        force: replace an existing folder.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    with outputs.reserved(
        output, force, [source.folder, *tasks.files_of(calibration.dataset)], ranks.is_first_started()
    ):
        return _prune(
            source,
            output,
            settings,
            calibration,
            resources or ResourceSettings(),
            resume,
            dtype,
            device,
            force,
            progress,
        )


def _prune(
    source: ModelSource,
    output: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    resources: ResourceSettings,
    resume: bool | None,
    dtype: str,
    device: str,
    force: bool,
    progress: Progress,
) -> PruneResult:
    start = time.perf_counter()
    loading.check_model(source, "prune")
    looks: list[Callable[[], object]] = [
        partial(loading.choose_device, device),
        lambda: skeleton_budgets(loading.load_skeleton(source), settings),
    ]
    if "fit_dtype" in settings.read and settings.fit_dtype != "auto":
        looks.append(partial(dtype_for_fits, dtype, settings, asked=True))
    if settings.guidance:
        looks.append(lambda: check_guidance(loading.load_skeleton(source)))
    if settings.needs_text:
        looks.append(partial(loading.check_length, source, calibration.sequence_length))
        looks.append(partial(loading.task_of(source).data_files, calibration.dataset))
        if calibration.experts == "all":
            looks.append(lambda: run_all_(loading.load_skeleton(source)))
    errors.raise_all(errors.collect(looks))
    device = ranks.device_of_rank(loading.choose_device(device))
    processor = loading.load_processor(source)
    before = pruned_before(source)
    for note in before:
        progress.say(f"note: {note}")
    samples = _calibration_samples(source, processor, calibration, progress) if settings.needs_text else []
    fingerprint = fingerprint_of(samples) if samples else None
    with peak_memory(device) as memory, ranks.joined(device) as group:
        _check_ranks(settings, group)
        asked, dtype = dtype != "auto", _choose_dtype(dtype, source, device, group)
        if "fit_dtype" in settings.read:
            settings = with_fit_dtype(settings, device, group)
            dtype = dtype_for_fits(dtype, settings, asked=asked)
        size = Size(source, dtype, settings, calibration)
        placement = choose_placement(size, resources, settings, device, group)
        identity = {
            "model": source.fingerprint,
            "settings": settings.model_dump(mode="json"),
            "calibration": {**calibration.model_dump(mode="json"), "fingerprint": fingerprint} if samples else None,
            "dtype": dtype,
            "device": device.partition(":")[0],
            "processes": group.size,
            "version": __version__,
        }
        run = RunFolder(run_folder.path_of(output), identity, resume, group)
        for name in run.damaged:
            progress.say(f"{name} of the interrupted run is damaged; its work is done again")
        with kept_where_resuming_helps(run, "finished blocks", resume, progress):
            check_disk(run, size, settings, placement)
            place = "on disk, a block at a time in memory" if placement.offload else "in memory"
            progress.say(f"{'resuming' if run.resumed else 'pruning'} {source.name} in {dtype} on {device}, {place} …")
            walked = _walk(source, settings, calibration, samples, run, placement, dtype, device, group, progress)
            layers = walked.layers
            # The others are done: they do not wait for the first, which may save for longer than they may wait.
            if group.is_first:
                progress.say("saving …")
                layers = saving.save(
                    source, output, run, walked, settings, processor, identity, force, placement, progress
                )
            run.remove()
    seconds = time.perf_counter() - start
    return PruneResult(
        folder=str(output),
        layers=layers,
        left_dense=walked.left_dense,
        seconds=seconds,
        peak_memory_bytes=memory.peak_bytes,
        calibration_fingerprint=fingerprint,
        grid=settings.grid,
        warnings=(*before, *closing_notes(settings, calibration, layers, walked, seconds, placement, group)),
    )


def _walk(
    source: ModelSource,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    samples: list[Sample],
    run: RunFolder,
    placement: Placement,
    dtype: str,
    device: str,
    group: Ranks,
    progress: Progress,
) -> Walked:
    """Prune every block and leave it finished in the run folder. The model is released at the end."""
    weights: Weights
    if placement.offload:
        weights = StreamedWeights(source, loading.load_skeleton(source, dtype), device)
    else:
        weights = ResidentWeights(loading.load_model(source, dtype, device))
    if samples and calibration.experts == "all":
        run_all_(weights.model)
    check_stored(source, weights.model, settings)
    walk = Walk(
        weights=weights,
        task=loading.task_of(source),
        samples=[on_device(sample, device) for sample in group.share(samples)] if samples else [],
        settings=settings,
        run=run,
        pool=StatePool(run.states, placement.states, torch.device(device)),
        progress=progress,
        ranks=group,
        by_sample=placement.by_sample,
    )
    layers = walk.prune_()
    budgets = run.budgets or {}
    exceptions = frozenset(name for name, budget in budgets.items() if budget.pattern.name == DENSE)
    left_dense = left_dense_of(walk.weights.model, settings, layers, budgets)
    whole = run.blocks < len(weights.blocks)
    return Walked(layers, left_dense, exceptions, run.blocks, whole, checkpoint_of(source, weights.model))


def _choose_dtype(requested: str, source: ModelSource, device: str, group: Ranks) -> str:
    """As everywhere, but for a bfloat16 checkpoint on a CPU "auto" is what the CPUs of all ranks multiply faster."""
    if requested == "auto" and device == "cpu" and loading.stored_dtype(source) == "bfloat16":
        return faster_dtype(device, group)
    return loading.choose_dtype(requested, source, device)


def _check_ranks(settings: PruneSettings, group: Ranks) -> None:
    """Raises:
    UsageError: what is asked for does not run on several processes.
    """
    if group.size > 1 and (settings.fits_blocks or settings.distillation_epochs):
        raise UsageError(
            "reconstruct and distillation take one step of Adam after the other and do not run on several processes; "
            "choose --fit fast, or run one process"
        )


def check_guidance(model: Any) -> None:
    """Raises:
    UsageError: layers of the model do not read all tokens.
    """
    if experts_of(model):
        raise UsageError(
            "guidance weighs tokens, and nothing says which of them an expert of this model gets; leave guidance out"
        )


def _calibration_samples(
    source: ModelSource, processor: Any, calibration: CalibrationSettings, progress: Progress
) -> list[Sample]:
    progress.say(f"reading {calibration.dataset} …")
    size = calibration.samples, calibration.sequence_length, calibration.seed
    return loading.task_of(source).calibration(processor, loading.config_of(source), calibration.dataset, *size)
