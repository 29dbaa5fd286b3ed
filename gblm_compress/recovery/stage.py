"""The recovery stage: from a pruned folder and the dense model to a trained folder of the same pattern, resumable."""

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from gblm_compress import __version__, errors
from gblm_compress.calibration import ranks
from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.calibration.weights import StatePool
from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.machine.memory import freed_memory_kept, peak_memory
from gblm_compress.methods.mask_rules import MASK_RULES
from gblm_compress.methods.optimisers import OPTIMISERS
from gblm_compress.methods.patterns import UNSTRUCTURED, Pattern
from gblm_compress.models import grids, loading, manifest
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.recovery import kept
from gblm_compress.recovery.kept import Kept, Look
from gblm_compress.recovery.losses import Losses
from gblm_compress.recovery.saving import save
from gblm_compress.recovery.teacher import Teacher, check_same_head
from gblm_compress.recovery.texts import Windows, windows_of
from gblm_compress.recovery.training import Budget, Training
from gblm_compress.recovery.weights import Weights, bytes_a_weight
from gblm_compress.settings import RecoverSettings
from gblm_compress.storage import outputs
from gblm_compress.storage.resuming import kept_where_resuming_helps
from gblm_compress.tasks import files_of
from gblm_compress.tasks.task import fingerprint, on_device

SHARE_FOR_STATES = 0.3
"""What the dense model says of windows takes at most this share of the memory that is free once models are loaded."""


@dataclass(frozen=True)
class RecoverResult:
    """The outcome of the stage.

    Attributes:
        folder: what was written.
        tokens: trained on, over all looks.
        best: number of the look whose weights were kept.
        curve: all looks at held-out text.
        passes: how often a window was read, on average.
        overlap: {text that the data must not hold: the share of its 13-grams that it holds}.
        trained: weights that were trained, those that are pruned in the end not counted.
        seconds: of the whole stage, and of the runs before that it went on from.
    """

    folder: str
    tokens: int
    best: int
    curve: tuple[Look, ...]
    passes: float
    overlap: dict[str, float]
    trained: int
    seconds: float
    peak_memory_bytes: int

    @property
    def before(self) -> float:
        """Mean loss of predictions on held-out text at the start, in nats per token, as in `Look`."""
        return self.curve[0].held_out

    @property
    def after(self) -> float:
        """The same of what was kept."""
        return self.curve[self.best].held_out

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "before": self.before, "after": self.after}


def check(source: ModelSource, teacher: ModelSource, settings: RecoverSettings, device: str) -> None:
    """Find what makes a recovery impossible, before a model is loaded; the zeros of the pruned folder are looked at.

    Raises:
        GblmError: all faults at once.
    """
    looks: list[Callable[[], object]] = [
        partial(_check_models, source, teacher, settings, device),
        OPTIMISERS[settings.optimiser].check,
    ]
    check_kind(source)
    looks += [partial(loading.task_of(source).data_files, name) for name in settings.datasets]
    looks += [partial(loading.check_length, source, settings.sequence_length)]
    errors.raise_all(errors.collect(looks))


def check_kind(source: ModelSource) -> None:
    """Raises:
    UsageError: models of that task are not trained.
    """
    if not (task := loading.task_of(source)).generates:
        raise UsageError(
            f"recover trains causal language models, and {source.name!r} is {task.help}; prune with --fit best"
        )


def check_mask(settings: RecoverSettings, patterns: Collection[str], on_grids: bool) -> None:
    """Raises:
    UsageError: the mask rule does not do for the patterns, or for weights on grids.
    """
    rule = MASK_RULES[settings.mask]
    if rule.moves and on_grids:
        raise UsageError(f"mask {settings.mask} needs weights that move freely, and these lie on grids; give fixed")
    if others := sorted(name for name in patterns if not rule.takes(Pattern(name))):
        raise UsageError(f"mask {settings.mask} is for {rule.only} patterns, and layers are {', '.join(others)}")


def checkpoint_bytes(pruned: ModelSource) -> int:
    """What checkpoints take at most: 18 times the model in 16 bits, for two of weights, two moments and a mask, and two
    of the best weights with their mask."""
    return 18 * 2 * pruned.bytes_on_disk // getattr(torch, loading.stored_dtype(pruned)).itemsize


def recover(
    source: ModelSource,
    teacher: ModelSource,
    output: Path,
    settings: RecoverSettings,
    *,
    resume: bool | None = False,
    device: str = "auto",
    force: bool = False,
    progress: Progress,
) -> RecoverResult:
    """Train the pruned model `source` to predict what `teacher` does; write and verify a folder of the same pattern.

    Args:
        source: a folder that `prune` wrote, never modified.
        teacher: the dense model that it was pruned from.
        output: the new folder; it appears whole or not at all.
        resume: go on from the last checkpoint; it must be of the same settings. None: go on if it is.
        device: where to compute.
        force: replace an existing folder.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    inputs = [source.folder, teacher.folder, *files_of(*settings.datasets)]
    with outputs.reserved(output, force, inputs, ranks.is_first_started()):
        start = time.monotonic()
        check(source, teacher, settings, device)
        device = ranks.device_of_rank(loading.choose_device(device))
        with freed_memory_kept(), peak_memory(device) as memory, ranks.joined(device) as group:
            result = _recover(source, teacher, output, settings, resume, device, force, group, progress)
        training, windows, before = result
        seconds = before + time.monotonic() - start
        state = training.progress
        return RecoverResult(
            folder=str(output),
            tokens=state.curve[-1].tokens,
            best=state.best,
            curve=tuple(state.curve),
            passes=windows.passes(state.step),
            overlap=windows.overlap,
            trained=training.trained,
            seconds=seconds,
            peak_memory_bytes=memory.peak_bytes,
        )


def _recover(
    source: ModelSource,
    teacher: ModelSource,
    output: Path,
    settings: RecoverSettings,
    resume: bool | None,
    device: str,
    force: bool,
    group: Ranks,
    progress: Progress,
) -> tuple[Training, Windows, float]:
    """The training, once its folder is written; and the seconds of the runs that it went on from."""
    if settings.batch < group.size:
        raise UsageError(f"a step of {settings.batch} windows cannot be split over {group.size} processes; give more")
    settings = _with_dtype(settings, device, group)
    task, processor = loading.task_of(source), loading.load_processor(source)
    progress.say(f"reading {', '.join(each.dataset for each in settings.data)} …")
    windows = windows_of(task, processor, loading.config_of(source), settings)
    identity = {
        "model": source.fingerprint,
        "teacher": teacher.fingerprint,
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_minutes", "gradient_checkpointing"}),
        "text": fingerprint(windows.samples),
        "held_out": windows.held_out,
        "device": device.partition(":")[0],
        "processes": group.size,
        "version": __version__,
    }
    checkpoints = Kept(kept.path_of(output), identity, resume, group)
    with kept_where_resuming_helps(checkpoints, "checkpoints", resume, progress):
        student = loading.load_model(source, "float32", device)
        dense = loading.load_model(teacher, settings.fit_dtype, device)
        check_same_head(dense, student, teacher.name)
        samples = [on_device(sample, device) for sample in windows.samples]
        states, pool, in_files = _bytes_of_states(windows, dense.config, settings), None, 0
        if states:
            room = int(SHARE_FOR_STATES * psutil.virtual_memory().available) // ranks.processes_here()
            pool = StatePool(checkpoints.states, room, torch.device(device))
            in_files = states * group.size if states > room else 0
        needed = source.bytes_on_disk + checkpoint_bytes(source) + in_files - checkpoints.bytes
        outputs.check_space(output, needed, "the output, its checkpoints and what the dense model says of the text")
        voice = Teacher(dense, task, samples, windows.used, settings.fit_dtype, pool, settings.hidden_weight > 0)
        layers = manifest.read(source.folder)["layers"]
        weights = Weights(
            student,
            {f"{name}.weight": student.get_submodule(name) for name in layers},
            {f"{name}.weight": grid.to(device) for name, grid in grids.read_grids(source).items()},
            MASK_RULES[settings.mask],
            getattr(torch, settings.fit_dtype),
            group,
        )
        training = Training(
            student,
            weights,
            {f"{name}.weight": _budget(layer) for name, layer in layers.items()},
            Losses(student, task, voice, samples, settings),
            windows,
            settings,
            checkpoints,
            group,
        )
        done = "going on with" if checkpoints.is_there else "training"
        progress.say(
            f"{done} {source.name} on {device}: {settings.steps:,} steps of {settings.batch} × "
            f"{settings.sequence_length} tokens, {len(windows.held_out)} windows held out …"
        )
        before = checkpoints.load()[0].seconds if checkpoints.is_there else 0.0
        with chunked_attention():
            training.run(progress)
        if group.is_first:
            progress.say("saving …")
            save(source, output, student, training, processor, settings, windows, force)
        checkpoints.remove()
    return training, windows, before


def _bytes_of_states(windows: Windows, config: Any, settings: RecoverSettings) -> int:
    """What the inputs of the dense model's head take, which every process keeps where windows are read again."""
    if windows.passes() <= 1 or settings.hidden_weight:
        return 0
    tokens = len(windows.used) * settings.sequence_length
    return tokens * int(config.get_text_config().hidden_size) * getattr(torch, settings.fit_dtype).itemsize


def _check_models(source: ModelSource, teacher: ModelSource, settings: RecoverSettings, device: str) -> None:
    loading.check_model(source, "recover")
    if not manifest.is_pruned(source.folder):
        raise ModelError(
            f"model {source.name!r} was not made by `gblm-compress prune`, so that nothing says which zeros must stay; "
            "give a pruned folder"
        )
    content = manifest.read(source.folder)
    loading.check_model(teacher, "learn from")
    if manifest.is_pruned(teacher.folder):
        raise UsageError(f"teacher {teacher.name!r} is pruned itself; give the dense model that it was pruned from")
    own, theirs = (loading.config_of(each).get_text_config() for each in (source, teacher))
    if own.vocab_size != theirs.vocab_size:
        raise UsageError(
            f"teacher {teacher.name!r} has {theirs.vocab_size} tokens, and the pruned model {own.vocab_size}; give the "
            "dense model that it was pruned from"
        )
    patterns = {layer["pattern"] for layer in content["layers"].values()}
    check_mask(settings, patterns, bool(grids.read_grids(source)))
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in content["layers"].values())
    survivors = sum(layer["nonzeros"] for layer in content["layers"].values())
    processes = ranks.processes_here()
    here = loading.choose_device(device)
    each = bytes_a_weight(_with_dtype(settings, here, Ranks()), survivors / weights, processes)
    needed = processes * (each * weights + teacher.bytes_on_disk)
    free = psutil.virtual_memory().available
    if here == "cpu" and needed > free:
        raise UsageError(
            f"training {weights:,} weights takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            f"free: models of up to about {free / processes / (each + 4) / 1e9:.2f} billion weights fit; prune "
            "with --fit balanced, which works on one block at a time"
        )
    try:
        grids.verify(source)
    except VerificationError as error:
        raise ModelError(f"model {source.name!r} is not what `prune` wrote: {error}; prune again") from error


def _budget(layer: dict[str, Any]) -> Budget:
    """What a mask of the layer must have; half a weight more than its zeros, so that no rounding loses one of them."""
    (rows, columns), pattern = layer["shape"], Pattern(layer["pattern"])
    zeros = rows * columns - layer["nonzeros"] + 0.5 * (rows if pattern.name == UNSTRUCTURED else 1)
    return Budget(pattern, zeros / (rows * columns))


def _with_dtype(settings: RecoverSettings, device: str, group: Ranks) -> RecoverSettings:
    """The settings, with "auto" as dtype of products replaced by its meaning here."""
    if settings.fit_dtype != "auto":
        return settings
    return settings.model_copy(update={"fit_dtype": faster_dtype(device, group)})
