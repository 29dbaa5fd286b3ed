"""The pruning stage: from a model source to a verified folder, resumable.

The walk over the blocks is in `walk.py`, what goes where is decided in `planning.py`; here is what surrounds them: the
folder of the run, and how the output is put together from the source and the finished blocks.
"""

import math
import shutil
import time
import timeit
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gblm_compress import __version__, faults
from gblm_compress.calibration import ranks
from gblm_compress.calibration.block_weights import ResidentWeights, StreamedWeights, Weights
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import GblmError, ModelError, OutputError, RankError, UsageError, VerificationError
from gblm_compress.machine.environment import cpu_name
from gblm_compress.machine.measurements import remembered
from gblm_compress.machine.memory import peak_memory
from gblm_compress.methods.fits import FITS
from gblm_compress.methods.zeros import count_nonzeros, keep_only, positive_zeros
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import linear_weights, prunable_layers
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import costs, run_folder
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.budgeting import planned_budgets
from gblm_compress.pruning.planning import Plan, Size, check_disk, memory_plan
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.walk import Walk
from gblm_compress.settings import PUBLISHED_CALIBRATION, CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.storage import folders, outputs
from gblm_compress.tasks import text
from gblm_compress.tasks.task import Sample, on_device
from gblm_compress.tasks.task import fingerprint as fingerprint_of


@dataclass(frozen=True)
class LeftDense:
    """A linear layer, or a tensor of fused ones, that was not pruned: how many weights it has, and the reason."""

    weights: int
    reason: str


@dataclass(frozen=True)
class PruneResult:
    """The outcome of the stage. Only the two measurements differ between runs with the same seed.

    Attributes:
        folder: what was written; None where a model in memory was pruned in place.
        layers: the pruned ones.
        left_dense: all other linear weights of the model, and why they were not pruned.
    """

    folder: str | None
    layers: dict[str, LayerResult]
    left_dense: dict[str, LeftDense]
    seconds: float
    peak_memory_bytes: int
    calibration_fingerprint: str | None = None
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
        dtype: to compute in, see `ModelSettings`; the folder keeps the checkpoint's own.
        device: where to compute.
        force: replace an existing folder.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    with outputs.reserved(output, force, [source.folder, *text.files(calibration.dataset)], ranks.is_first_started()):
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
        lambda: planned_budgets(loading.load_skeleton(source), settings),
    ]
    if settings.needs_text:
        looks.append(partial(loading.check_length, source, calibration.sequence_length))
        looks.append(partial(text.check_source, calibration.dataset))
    faults.raise_all(faults.collect(looks))
    device = ranks.device_of_rank(loading.choose_device(device))
    tokenizer = loading.load_tokenizer(source)
    pruned_before = _pruned_before(source)
    for note in pruned_before:
        progress.say(f"note: {note}")
    samples = _calibration_samples(source, tokenizer, calibration, progress) if settings.needs_text else []
    fingerprint = fingerprint_of(samples) if samples else None
    with peak_memory(device) as memory, ranks.joined(device) as group:
        _check_ranks(settings, group)
        dtype = _choose_dtype(dtype, source, device, group)
        size = Size(source, dtype, settings, calibration)
        plan = memory_plan(size, resources, settings, device, group)
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
        with _kept_where_resuming_helps(run, resume, progress):
            check_disk(run, size, settings, plan)
            place = "on disk, a block at a time in memory" if plan.offload else "in memory"
            progress.say(f"{'resuming' if run.resumed else 'pruning'} {source.name} in {dtype} on {device}, {place} …")
            walked = _walk(source, settings, samples, run, plan, dtype, device, group, progress)
            layers = walked.layers
            # The others are done: they do not wait for the first, which may save for longer than they may wait.
            if group.is_first:
                progress.say("saving …")
                layers = _save(source, output, run, walked, settings, tokenizer, identity, force, plan, progress)
            run.remove()
    seconds = time.perf_counter() - start
    return PruneResult(
        folder=str(output),
        layers=layers,
        left_dense=walked.left_dense,
        seconds=seconds,
        peak_memory_bytes=memory.peak_bytes,
        calibration_fingerprint=fingerprint,
        warnings=(*pruned_before, *_warnings(settings, calibration, layers, walked, seconds, plan, group)),
    )


@dataclass(frozen=True)
class _Walked:
    """What is left of a walk once its model is released.

    Attributes:
        left_dense: see `PruneResult`.
        exceptions: the layers among them that an exception or the allocation decided about.
        blocks: how many the model has.
    """

    layers: dict[str, LayerResult]
    left_dense: dict[str, LeftDense]
    exceptions: frozenset[str]
    blocks: int
    checkpoint: Checkpoint


def _walk(
    source: ModelSource,
    settings: PruneSettings,
    samples: list[Sample],
    run: RunFolder,
    plan: Plan,
    dtype: str,
    device: str,
    group: Ranks,
    progress: Progress,
) -> _Walked:
    """Prune every block and leave it finished in the run folder. The model is released at the end."""
    weights: Weights
    if plan.offload:
        weights = StreamedWeights(source, loading.load_skeleton(source, dtype), device)
    else:
        weights = ResidentWeights(loading.load_model(source, dtype, device))
    _check_stored(source, weights.model, settings)
    walk = Walk(
        weights=weights,
        task=loading.task_of(source),
        samples=[on_device(sample, device) for sample in group.share(samples)] if samples else [],
        settings=settings,
        run=run,
        pool=StatePool(run.states, plan.states, torch.device(device)),
        progress=progress,
        ranks=group,
        by_sample=plan.by_sample,
    )
    layers = walk.prune_()
    exceptions = frozenset(name for name in run.budgets or {} if name not in layers)
    left_dense = left_dense_of(walk.weights.model, settings, layers)
    return _Walked(layers, left_dense, exceptions, len(walk.weights.blocks), _checkpoint(source, walk.weights.model))


def left_dense_of(model: nn.Module, settings: PruneSettings, layers: Collection[str]) -> dict[str, LeftDense]:
    """All linear weights of a model that are not among the pruned `layers`, and why they were not pruned."""
    return {
        name: LeftDense(weights, reason or "left dense by an exception or the allocation")
        for name, weights, reason in linear_weights(model, settings.targets, settings.ignore)
        if name not in layers
    }


def _choose_dtype(requested: str, source: ModelSource, device: str, group: Ranks) -> str:
    """As everywhere, but for a bfloat16 checkpoint on a CPU "auto" is what the CPUs of all ranks multiply faster."""
    if requested == "auto" and device == "cpu" and loading.stored_dtype(source) == "bfloat16":
        what = f"dtype of products on {torch.get_num_threads()} threads"
        machine = f"{cpu_name()}, torch {torch.__version__}"
        faster = remembered(machine, what, _faster_dtype, lambda dtype: dtype in ("bfloat16", "float32"))
        return "bfloat16" if group.every(faster == "bfloat16", torch.device(device)) else "float32"
    return loading.choose_dtype(requested, source, device)


def _faster_dtype() -> str:
    """Whether a product of ordinary size is faster in bfloat16 or in float32 here; the better of some runs each."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.mm, x, weight), number=1, repeat=5)[1:])
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


_STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_stored(source: ModelSource, model: nn.Module, settings: PruneSettings) -> None:
    """Raises:
    ModelError: the files do not hold a layer's weight as the model does.
    """
    checkpoint = _checkpoint(source, model)
    for block in prunable_layers(model, settings.targets, settings.ignore):
        for name in block:
            if f"{name}.weight" not in checkpoint:
                raise ModelError(
                    f"model {source.name!r}: its files hold no tensor {name + '.weight'!r}, transformers converts "
                    "it while loading; save the model with save_pretrained first, or add the layer to --ignore"
                )
            if (stored := checkpoint.read(f"{name}.weight").dtype) not in _STORED:
                raise ModelError(
                    f"model {source.name!r}: its files hold {name + '.weight'!r} in {stored}, not as floating-point "
                    "numbers of 16 bits or more; the model is quantised or damaged: prune the original"
                )


def _checkpoint(source: ModelSource, model: Any) -> Checkpoint:
    return Checkpoint(source.folder, model.state_dict(), model.base_model_prefix)


def _check_ranks(settings: PruneSettings, group: Ranks) -> None:
    """Raises:
    UsageError: what is asked for does not run on several processes.
    """
    if group.size > 1 and (settings.fits_blocks or settings.distillation_epochs):
        raise UsageError(
            "reconstruct and distillation take one step of Adam after the other and do not run on several processes; "
            "choose --fit fast, or run one process"
        )


@contextmanager
def _kept_where_resuming_helps(run: RunFolder, resume: bool | None, progress: Progress) -> Iterator[None]:
    """Leave the run folder after an interruption or a full disk; remove it where the same would happen again."""
    again = "the same command" if resume is None else "the same command with --resume"
    try:
        yield
    except KeyboardInterrupt:
        progress.say(f"what is finished is kept: {again} goes on from there")
        raise
    except (OSError, SafetensorError, OutputError) as error:
        reason = str(error)
        if not isinstance(error, OutputError):
            reason = f"{str(run.folder)!r} cannot be written ({getattr(error, 'strerror', None) or reason})"
        if not run.bytes:
            run.remove()
            raise OutputError(reason) from error
        raise OutputError(f"{reason}; finished blocks are kept: make room and give {again}") from error
    except RankError:
        raise
    except GblmError:
        run.remove()
        raise


def _save(
    source: ModelSource,
    output: Path,
    run: RunFolder,
    walked: _Walked,
    settings: PruneSettings,
    tokenizer: Any,
    identity: dict[str, Any],
    force: bool,
    plan: Plan,
    progress: Progress,
) -> dict[str, LayerResult]:
    """Put the output together from the source and the finished blocks, and verify it."""
    layers, checkpoint = walked.layers, walked.checkpoint
    blocks = {name: index for index in range(walked.blocks) for name in run.layers(index)}
    results = dict(layers)

    def changed(name: str) -> Tensor | None:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            return None
        stored = checkpoint.read(name)
        computed = run.finished_layer(blocks[layer], layer)
        # Without an update a survivor keeps its value to the last bit, whatever dtype it was judged in.
        weight = positive_zeros(computed.to(stored.dtype)) if settings.updates else keep_only(stored, computed != 0)
        results[layer] = replace(layers[layer], nonzeros=count_nonzeros(weight))
        return weight

    with folders.atomic_folder(output, force=force, inside=run.folder) as temporary:
        checkpoint.rewrite(temporary, changed)
        for name in ("config.json", "generation_config.json"):
            if (source.folder / name).exists():
                shutil.copyfile(source.folder / name, temporary / name)
        loading.save_tokenizer(tokenizer, temporary)
        manifest.write(
            temporary,
            source=source,
            settings=identity["settings"],
            calibration=identity["calibration"],
            compute={"dtype": identity["dtype"], "device": identity["device"]},
            layers={name: asdict(layer) for name, layer in results.items()},
            left_dense={name: asdict(dense) for name, dense in walked.left_dense.items()},
        )
        progress.say("verifying …")
        manifest.verify(temporary)
        _verify_by_loading(ModelSource(str(output), temporary), results, plan)
    return results


def _verify_by_loading(written: ModelSource, layers: dict[str, LayerResult], plan: Plan) -> None:
    """Load the folder as its users will, block by block where it does not fit in memory, and count the weights it has.

    Raises:
        VerificationError: what transformers loads is not what the manifest says.
    """
    try:
        model = loading.load_skeleton(written) if plan.offload else loading.load_model(written)
        weights = StreamedWeights(written, model, "cpu") if plan.offload else ResidentWeights(model)
        loading.load_tokenizer(written)
    except ModelError as error:
        raise VerificationError(f"the written folder does not load: {error}") from error
    for index in range(len(weights.blocks)):
        with weights.block(index):
            for name, layer in layers.items():
                if not name.startswith(f"{weights.prefix}.{index}."):
                    continue
                found = count_nonzeros(weights.model.get_submodule(name).get_parameter("weight"))
                if found != layer.nonzeros:
                    raise VerificationError(
                        f"{name}: transformers loads {found} nonzeros from the written folder, and {layer.nonzeros} "
                        "were kept"
                    )


def _pruned_before(source: ModelSource) -> list[str]:
    """What to say about a source that this program has pruned already."""
    if not manifest.is_ours(source.folder):
        return []
    layers = manifest.read(source.folder).get("layers", {}).values()
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    zeros = 1 - sum(layer["nonzeros"] for layer in layers) / weights
    patterns = ", ".join(sorted({layer["pattern"] for layer in layers}))
    return [
        f"{source.name} is pruned already ({patterns}, {100 * zeros:.1f} % zeros); zeros stay zeros, so that a lower "
        "sparsity does nothing: prune the dense model to change method or pattern"
    ]


def _calibration_samples(
    source: ModelSource, tokenizer: Any, calibration: CalibrationSettings, progress: Progress
) -> list[Sample]:
    progress.say(f"reading {calibration.dataset} …")
    size = calibration.samples, calibration.sequence_length, calibration.seed
    return loading.task_of(source).calibration(tokenizer, loading.config_of(source), calibration.dataset, *size)


def _warnings(
    settings: PruneSettings,
    calibration: CalibrationSettings,
    layers: dict[str, LayerResult],
    walked: _Walked,
    seconds: float,
    plan: Plan,
    group: Ranks,
) -> tuple[str, ...]:
    notes = []
    size = (calibration.samples, calibration.sequence_length)
    if "alpha_scale" in settings.read and settings.alpha_scale == "published" and size != PUBLISHED_CALIBRATION:
        notes.append(
            f"alpha = {settings.alpha:g} weighs gradients against activations as published only at 128 samples of "
            f"2048 tokens; here it is {calibration.samples} of {calibration.sequence_length} "
            "(--alpha-scale normalised keeps its meaning)"
        )
    dense = sum(walked.left_dense[name].weights for name in walked.exceptions)
    weights = sum(math.prod(layer.shape) for layer in layers.values()) + dense
    uniform = weights * (1 - settings.uniform_budget.sparsity)
    extra = sum(layer.nonzeros for layer in layers.values()) + dense - uniform
    if settings.overrides and extra > 0:
        notes.append(
            f"the exceptions keep {extra:,.0f} weights more than {settings.pattern} everywhere would "
            f"({100 * extra / uniform:.1f} %)"
        )
    able = ["fast"] if group.size > 1 else [name for name in FITS if name != "best" or not plan.offload]
    better = costs.better_fit(settings, able)
    kept = settings.model_dump(exclude={"preset", "fit", "update", "distillation_epochs"}, exclude_defaults=True)
    cost = costs.passes(PruneSettings(**kept, fit=better)) / costs.passes(settings) if better else 0.0
    if cost > 1:
        notes.append(
            f"--fit {better} fits the surviving weights further and gives a better model at the same size; it takes "
            f"about {cost:.1f} times as long (estimated from its passes over the text: {cost * seconds:,.0f} s)"
        )
    return tuple(notes)
