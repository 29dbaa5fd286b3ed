"""The reordering stage: from a dense model to one that computes the same, its channels in a better order for N:M.

It walks over the dense model block by block, in memory or on disk, and changes nothing on the way. The folder is
written in one stream, and verified by what it computes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress import faults, tasks
from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.block_statistics import layer_statistics
from gblm_compress.calibration.block_weights import ResidentWeights, StreamedWeights, Weights
from gblm_compress.calibration.blocks import Block, BlockReplay
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.calibration.links import Heads, Link, find_links, guess_links, heads_of, tolerance
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.whole_calls import calls_of
from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.machine.memory import peak_memory
from gblm_compress.methods.channel_order import lost, reordered
from gblm_compress.methods.choices import Need
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import linear_weights, prunable_layers, weight_matrix
from gblm_compress.models.experts import run_all_
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.placement import Size, choose_placement
from gblm_compress.pruning.saving import checkpoint_of, copy_settings
from gblm_compress.settings import CalibrationSettings, PruneSettings, ReorderSettings, ResourceSettings
from gblm_compress.storage import folders, outputs
from gblm_compress.tasks.task import Sample, Task, fingerprint, on_device

ALIKE = PruneSettings(method="wanda", fit="none")
"""A pruning that measures what is measured here, so that it takes the same memory and disk."""

Move = tuple[int, Tensor]
"""A dimension of a tensor, and what lies at each place of it."""


@dataclass(frozen=True)
class ReorderedLayer:
    """A layer whose columns lie in another order.

    Attributes:
        producers: the layers whose rows moved with them.
        weights: of the layer.
        before: the share of Σ w²·x² over the text that N:M would take away in the order that there was.
        after: the same in the new order.
    """

    producers: tuple[str, ...]
    weights: int
    before: float
    after: float


@dataclass(frozen=True)
class ReorderResult:
    """The outcome of the stage.

    Attributes:
        folder: what was written.
        pattern: what it was reordered for.
        layers: those whose columns lie in another order.
        linear_weights: all linear weights of the model.
        change: how far the last hidden states of the written model are from the dense one's on a window of the text, as
            a share of them: rounding.
    """

    folder: str
    pattern: str
    layers: dict[str, ReorderedLayer]
    linear_weights: int
    change: float
    seconds: float
    peak_memory_bytes: int

    @property
    def before(self) -> float:
        """The mean over the layers, by their weights, of what N:M would have taken away."""
        return self._mean("before")

    @property
    def after(self) -> float:
        """The same in the new order."""
        return self._mean("after")

    @property
    def weights(self) -> int:
        """Weights of the layers whose columns lie in another order."""
        return sum(layer.weights for layer in self.layers.values())

    def _mean(self, which: str) -> float:
        return sum(getattr(layer, which) * layer.weights for layer in self.layers.values()) / self.weights

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "before": self.before, "after": self.after, "weights": self.weights}


def reorder(
    source: ModelSource,
    output: Path,
    settings: ReorderSettings,
    calibration: CalibrationSettings,
    *,
    resources: ResourceSettings | None = None,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    progress: Progress,
) -> ReorderResult:
    """Write the dense model `source` with its channels in an order in which an N:M pattern costs less.

    Args:
        source: the dense model, never modified.
        output: the new folder; it appears whole or not at all.
        calibration: the text on which channels are measured.
        resources: how much memory to take, and whether the model stays on disk.
        dtype: to compute in, see `ComputeSettings`; the folder keeps the checkpoint's own.
        device: where to compute.
        force: replace an existing folder.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    started = time.monotonic()
    with outputs.reserved(output, force, [source.folder, *tasks.files_of(calibration.dataset)]):
        _check(source, settings, calibration, device)
        device = loading.choose_device(device)
        dtype = loading.choose_dtype(dtype, source, device)
        processor, task = loading.load_processor(source), loading.task_of(source)
        progress.say(f"reading {calibration.dataset} …")
        size = calibration.samples, calibration.sequence_length, calibration.seed
        config = loading.config_of(source)
        samples = [on_device(each, device) for each in task.calibration(processor, config, calibration.dataset, *size)]
        takes = Size(source, dtype, ALIKE, calibration)
        placement = choose_placement(takes, resources or ResourceSettings(), ALIKE, device, Ranks())
        needed = takes.checkpoint + takes.in_files(placement)
        outputs.check_space(output, needed, "the output, and for hidden states meanwhile")
        with (
            peak_memory(device) as memory,
            chunked_attention(),
            folders.scratch_folder(output) as scratch,
            torch.no_grad(),
        ):
            pool = StatePool(scratch, placement.states, torch.device(device))
            place = _Place(dtype, device, placement.offload, pool)
            progress.say(f"reordering {source.name} for {settings.pattern} in {dtype} on {device} …")
            weights = place.weights(source)
            if calibration.experts == "all":
                run_all_(weights.model)
            layers, moves, states = _walk(weights, task, samples, settings, calibration, place, progress)
            if not layers:
                raise _nothing_to_reorder(source, settings)
            checkpoint = checkpoint_of(source, weights.model)
            total = sum(count for _, count, _ in linear_weights(weights.model))
            del weights

            def changed(name: str) -> Tensor | None:
                if name not in moves:
                    return None
                tensor = checkpoint.read(name)
                for dimension, order in moves[name]:
                    tensor = tensor.index_select(dimension, order)
                return tensor.contiguous()

            progress.say("saving …")
            with folders.atomic_folder(output, force=force) as temporary:
                checkpoint.rewrite(temporary, changed)
                copy_settings(source, temporary, processor)
                text = {**calibration.model_dump(mode="json"), "fingerprint": fingerprint(samples)}
                orders = {name: asdict(layer) for name, layer in layers.items()}
                manifest.write_reordered(
                    temporary,
                    source=source,
                    reordering={**settings.model_dump(mode="json"), "calibration": text, "layers": orders},
                    compute={"dtype": dtype, "device": device},
                )
                progress.say("verifying …")
                change = _verify(ModelSource(str(output), temporary), task, samples[:1], states, place)
    return ReorderResult(
        folder=str(output),
        pattern=settings.pattern,
        layers=layers,
        linear_weights=total,
        change=change,
        seconds=time.monotonic() - started,
        peak_memory_bytes=memory.peak_bytes,
    )


def check_dense(source: ModelSource) -> None:
    """Raises:
    ModelError: the model is pruned, or an export.
    """
    loading.check_model(source, "reorder")
    if manifest.is_pruned(source.folder):
        raise ModelError(
            f"model {source.name!r} is pruned already, and another order would break its pattern; give the dense model"
        )


def check_channels(source: ModelSource, settings: ReorderSettings) -> None:
    """Raises:
    ModelError: by the shapes of its layers the model has no channels to reorder.
    """
    skeleton = loading.load_skeleton(source)
    heads, m = heads_of(skeleton.config), settings.n_m[1]
    if not any(guess_links(name, layers, heads, m) for layers in prunable_layers(skeleton) for name in layers):
        raise _nothing_to_reorder(source, settings)


def _nothing_to_reorder(source: ModelSource, settings: ReorderSettings) -> ModelError:
    return ModelError(
        f"model {source.name!r} has no channels that may be reordered for {settings.pattern}: no layer reads what "
        "others give, channel by channel; prune it as it is"
    )


def _check(source: ModelSource, settings: ReorderSettings, calibration: CalibrationSettings, device: str) -> None:
    """Find what makes a reordering impossible, before a model is loaded.

    Raises:
        GblmError: all faults at once.
    """
    check_dense(source)
    looks: list[Callable[[], object]] = [
        partial(loading.choose_device, device),
        partial(loading.check_length, source, calibration.sequence_length),
        partial(loading.task_of(source).data_files, calibration.dataset),
        partial(check_channels, source, settings),
    ]
    if calibration.experts == "all":
        looks.append(lambda: run_all_(loading.load_skeleton(source)))
    faults.raise_all(faults.collect(looks))


@dataclass(frozen=True)
class _Place:
    """Where a model and the hidden states of the text are."""

    dtype: str
    device: str
    offload: bool
    pool: StatePool

    def weights(self, source: ModelSource) -> Weights:
        if self.offload:
            return StreamedWeights(source, loading.load_skeleton(source, self.dtype), self.device)
        return ResidentWeights(loading.load_model(source, self.dtype, self.device))


def _walk(
    weights: Weights,
    task: Task,
    samples: Sequence[Sample],
    settings: ReorderSettings,
    calibration: CalibrationSettings,
    place: _Place,
    progress: Progress,
) -> tuple[dict[str, ReorderedLayer], dict[str, list[Move]], Tensor]:
    """What becomes of the layers, {name of a tensor: its moves}, and the last hidden states of the first sample."""
    heads = heads_of(weights.model.config)
    weights, calls = calls_of(weights, task, samples)
    replay = BlockReplay(calls, weights, place.pool, Ranks())
    generator = torch.Generator().manual_seed(calibration.seed)
    found: dict[str, ReorderedLayer] = {}
    moves: dict[str, list[Move]] = {}
    blocks = weights.per_block(prunable_layers(weights.model))
    # Not by block, for the whole model may be the only one.
    with progress.counter("reordering", "layers", sum(map(len, blocks)), calls.tokens) as layer_done:
        for index, layers in enumerate(blocks):
            with weights.block(index):
                block = replay.block(index)
                for link, layer, order in _reorder_block(block, layers, heads, settings, generator, layer_done):
                    found[link.consumer] = layer
                    for name, dimension, places in link.moves(layers, order):
                        moves.setdefault(name, []).append((dimension, places))
                replay.advance(index)
    states = replay.hidden[0].clone()
    replay.hidden.release()
    return found, moves, states


def _reorder_block(
    block: Block,
    layers: dict[str, nn.Module],
    heads: Heads | None,
    settings: ReorderSettings,
    generator: torch.Generator,
    layer_done: Callable[[], None],
) -> list[tuple[Link, ReorderedLayer, Tensor]]:
    """The links of a block, what becomes of their consumers, and the new orders [runs, size]."""
    n, m = settings.n_m
    links = find_links(block, layers, heads, m, layer_done)
    consumers = {link.consumer: layers[link.consumer] for link in links}
    statistics = layer_statistics(block, consumers, {}, Need.ACTIVATIONS)
    found = []
    for link in links:
        weight = weight_matrix(consumers[link.consumer]).detach().float()
        worth = (weight * statistics[link.consumer].activations()).square()
        runs = worth.view(len(worth), link.runs, link.copies, -1)
        orders = []
        for run in range(link.runs):
            shared = runs[:, run].transpose(0, 1).flatten(0, 1)  # the rows of all copies below each other
            orders.append(reordered(shared, n, m, settings.rounds, generator))
        order = torch.stack(orders)
        columns = link.moves(layers, order)[0][2]
        before, after = (lost(worth, each, n, m) for each in (torch.arange(worth.shape[1]), columns))
        found.append((link, ReorderedLayer(link.producers, weight.numel(), before, after), order))
        layer_done()
    return found


def _verify(written: ModelSource, task: Task, samples: Sequence[Sample], states: Tensor, place: _Place) -> float:
    """How far the last hidden states are from those of the dense model, as a share of them.

    Raises:
        VerificationError: farther than rounding goes, or the folder does not load.
    """
    try:
        weights, calls = calls_of(place.weights(written), task, samples)
        loading.load_processor(written)
    except ModelError as error:
        raise VerificationError(f"the written folder does not load: {error}") from error
    replay = BlockReplay(calls, weights, place.pool, Ranks())
    for index in range(len(weights.blocks)):
        with weights.block(index):
            replay.advance(index)
    found = replay.hidden[0].float()
    change = float((found - states.float()).norm() / states.float().norm())
    largest = tolerance(states.dtype)
    if not change <= largest:
        raise VerificationError(
            f"the reordered model computes something else: its last hidden states are {change:.2g} of their size from "
            f"those of the dense one, and rounding explains {largest}"
        )
    return change
