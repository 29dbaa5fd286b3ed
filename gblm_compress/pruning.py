"""The pruning stage: calibrate, score, mask, update, save, verify.

    gradients of the dense model ─┐
    for each block:               ├─► score ─► mask ─► zeros, update ─► the block's output feeds the next
      statistics of the block  ───┘
    all survivors at once: distillation, if asked for

`prune_` works on a model in memory; `prune` is the whole stage, from a model source to a verified folder.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress import artifact, manifest, presets, sources, text
from gblm_compress.allocation import Budget
from gblm_compress.architecture import check_finite, find_blocks, prunable_layers, weight_matrix
from gblm_compress.block_pruning import LayerResult, layer_result, prune_block_
from gblm_compress.budgeting import budgets as layer_budgets
from gblm_compress.calibration import Block, BlockReplay, gradient_norms
from gblm_compress.distillation import distil_, head_inputs
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.memory import peak_memory
from gblm_compress.patterns import DENSE
from gblm_compress.progress import Progress
from gblm_compress.settings import PUBLISHED_CALIBRATION, CalibrationSettings, PruneSettings
from gblm_compress.sources import ModelSource


@dataclass(frozen=True)
class PruneResult:
    """The outcome of the stage. Only the two measurements differ between runs with the same seed."""

    folder: str
    layers: dict[str, LayerResult]
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "nonzeros": self.nonzeros, "weights": self.weights}


def prune(
    source: ModelSource,
    output: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    *,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    progress: Progress,
) -> PruneResult:
    """Prune `source` and write an ordinary Hugging Face folder with a manifest, then reopen and verify it.

    Args:
        source: the dense model, never modified.
        output: the new folder; it appears whole or not at all.
        dtype: to compute in; the folder keeps the checkpoint's own.
        device: where to compute.
        force: replace an existing folder.

    Raises:
        GblmError: of the kind that says what is wrong; nothing is left behind.
    """
    start = time.perf_counter()
    artifact.check_output(output, force)
    sources.check_not_export(source, "prune")
    device = sources.choose_device(device)
    dtype = sources.choose_dtype(dtype, source, device)
    stored = sources.stored_dtype(source)
    tokenizer = sources.load_tokenizer(source)
    samples = _calibration_samples(tokenizer, calibration, progress) if settings.needs_text else []
    with peak_memory(device) as memory:
        progress.say(f"loading {source.name} in {stored if dtype == 'auto' else dtype} on {device} …")
        model = sources.load_model(source, dtype, device)
        layers = prune_(model, [ids.to(device) for ids in samples], settings, progress)
        if dtype not in ("auto", stored):
            model, layers = _in_stored_precision(source, stored, model, layers, settings.updates)
    fingerprint = text.fingerprint(samples) if samples else None
    with artifact.atomic_folder(output) as temporary:
        progress.say("saving …")
        model.cpu().save_pretrained(temporary)
        sources.save_tokenizer(tokenizer, temporary)
        manifest.write(
            temporary,
            source=source,
            settings=settings.model_dump(mode="json"),
            calibration={**calibration.model_dump(), "fingerprint": fingerprint} if samples else None,
            compute={"dtype": dtype, "device": device.partition(":")[0]},
            layers={name: asdict(layer) for name, layer in layers.items()},
        )
        progress.say("verifying …")
        manifest.verify(temporary)
    seconds = time.perf_counter() - start
    return PruneResult(
        folder=str(output),
        layers=layers,
        seconds=seconds,
        peak_memory_bytes=memory.peak_bytes,
        calibration_fingerprint=fingerprint,
        warnings=_warnings(settings, calibration, layers, seconds),
    )


def prune_(
    model: nn.Module, samples: Sequence[Tensor], settings: PruneSettings, progress: Progress
) -> dict[str, LayerResult]:
    """Prune a model in place.

    Args:
        model: a causal language model in eval mode.
        samples: token ids, each [1, length]; may be empty for a method that needs no text.
        settings: what to prune and how.

    Returns:
        {layer name: what became of it}.

    Raises:
        ModelError: a value is NaN or infinite, or the architecture is not supported.
        UsageError: a width does not divide by M, or a name pattern matches nothing.
    """
    _, blocks = find_blocks(model)
    per_block = prunable_layers(model, settings.targets, settings.ignore)
    layers = {name: layer for block in per_block for name, layer in block.items()}
    _check_weights(layers, settings.budgets(list(layers)))

    gradients: dict[str, Tensor] = {}
    if settings.needs_gradients:
        gradients = gradient_norms(model, layers, samples, settings.gradient_norm, progress)
    budgets = layer_budgets(per_block, settings, gradients, _dense_blocks(model, blocks, samples))
    per_block = [
        {name: layer for name, layer in block.items() if budgets[name].pattern.name != DENSE} for block in per_block
    ]
    predictions = head_inputs(model, samples, progress) if settings.distillation_epochs else []
    dense = BlockReplay(model, blocks, samples) if settings.update == "reconstruct" else None
    replay = BlockReplay(model, blocks, samples) if settings.needs_blocks else None

    results: dict[str, LayerResult] = {}
    for index, block_layers in enumerate(progress.track(per_block, f"pruning ({settings.method})", unit="blocks")):
        block = replay.block(index) if replay else None
        own = {name: gradients.pop(name) for name in block_layers if name in gradients}
        if dense:
            dense.advance(index)
        results |= prune_block_(block, block_layers, own, settings, budgets, dense.hidden if dense else ())
        if replay and index + 1 < len(blocks):
            replay.advance(index)
    if settings.distillation_epochs:
        pruned = {name: layer for block in per_block for name, layer in block.items()}
        distil_(
            model,
            pruned,
            samples,
            predictions,
            epochs=settings.distillation_epochs,
            rate=settings.distillation_rate,
            compute=settings.fit_dtype,
            progress=progress,
        )
        results = {name: layer_result(layer, budgets[name]) for name, layer in pruned.items()}
    return results


def _dense_blocks(model: nn.Module, blocks: list[nn.Module], samples: Sequence[Tensor]) -> Iterator[Block]:
    """Every block with its inputs, as the model is now; measured only if somebody asks."""
    replay = BlockReplay(model, blocks, samples)
    for index in range(len(blocks)):
        yield replay.block(index)
        replay.advance(index)


def _check_weights(layers: dict[str, nn.Module], budgets: dict[str, Budget]) -> None:
    """Find every reason not to start before the minutes of calibration begin."""
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach()
        pattern = budgets[name].pattern
        if not pattern.fits(weight.shape[1]):
            assert pattern.n_m is not None
            raise UsageError(
                f"{name}: in_features={weight.shape[1]} is not a multiple of {pattern.n_m[1]}, which pattern "
                f"{pattern.name} needs; add it to --ignore, or choose another pattern"
            )
        check_finite(name, "weights", weight)


def _calibration_samples(tokenizer: Any, calibration: CalibrationSettings, progress: Progress) -> list[Tensor]:
    progress.say(f"reading {calibration.dataset} …")
    ids = text.tokenize(tokenizer, text.load_text(calibration.dataset, "calibration"))
    return text.random_windows(
        ids, calibration.samples, calibration.sequence_length, calibration.seed, calibration.dataset
    )


@torch.no_grad()
def _in_stored_precision(
    source: ModelSource, stored: str, pruned: nn.Module, results: dict[str, LayerResult], updated: bool
) -> tuple[nn.Module, dict[str, LayerResult]]:
    """The source in its own dtype with the zeros of `pruned`, whatever dtype those were computed in, and with its
    survivors, rounded, where they were updated.
    """
    original: nn.Module = sources.load_model(source, stored)
    rounded = {}
    for name, result in results.items():
        weight = weight_matrix(original.get_submodule(name))
        computed = weight_matrix(pruned.get_submodule(name)).to(weight.device)
        if updated:
            weight.copy_(computed)
        weight.masked_fill_((computed == 0) | (weight == 0), 0.0)
        remaining = int(torch.count_nonzero(weight))
        rounded[name] = replace(result, nonzeros=remaining)  # an updated weight may be too small for the dtype
        if not updated and remaining != result.nonzeros:
            raise ModelError(
                f"{name}: {result.nonzeros} weights survive in the dtype of computation but {remaining} in "
                f"{stored}; compute in a dtype as wide as the checkpoint's"
            )
    return original, rounded


def _warnings(
    settings: PruneSettings, calibration: CalibrationSettings, layers: dict[str, LayerResult], seconds: float
) -> tuple[str, ...]:
    notes = []
    size = (calibration.samples, calibration.sequence_length)
    if settings.method == "gblm" and settings.alpha_scale == "published" and size != PUBLISHED_CALIBRATION:
        notes.append(
            f"alpha = {settings.alpha:g} weighs gradients against activations as published only at 128 samples of "
            f"2048 tokens; here it is {calibration.samples} of {calibration.sequence_length} "
            "(--alpha-scale normalised keeps its meaning)"
        )
    weights = sum(math.prod(layer.shape) for layer in layers.values())
    uniform = weights * (1 - settings.uniform_budget.sparsity)
    extra = sum(layer.nonzeros for layer in layers.values()) - uniform
    if settings.overrides and extra > 0:
        notes.append(
            f"the exceptions in 'overrides' keep {extra:,.0f} weights more than {settings.pattern} everywhere in the "
            f"pruned layers ({100 * extra / uniform:.1f} %)"
        )
    if better := presets.better(settings):
        cost = presets.passes(PruneSettings(preset=better)) / presets.passes(settings)
        notes.append(
            f"--preset {better} fits the surviving weights further and gives a better model at the same size; it takes "
            f"about {cost:.1f} times as long (estimated from its passes over the text: {cost * seconds:,.0f} s)"
        )
    return tuple(notes)
