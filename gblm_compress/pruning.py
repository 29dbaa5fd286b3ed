"""The pruning stage: calibrate, score, mask, save, verify.

    gradients of the dense model ─┐
    for each block:               ├─► score ─► mask ─► zeros in place ─► the block's output feeds the next
      activations of the block ───┘

`prune_` works on a model in memory; `prune` is the whole stage, from a model source to a verified folder.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress import artifact, manifest, sources, text
from gblm_compress.allocation import Budget
from gblm_compress.architecture import check_finite, find_blocks, prunable_layers, weight_matrix
from gblm_compress.block_pruning import LayerResult, prune_block_
from gblm_compress.calibration import BlockReplay, gradient_norms
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.memory import peak_memory
from gblm_compress.progress import Progress
from gblm_compress.saliency import SALIENCIES
from gblm_compress.settings import CalibrationSettings, PruneSettings
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
            model = _in_stored_precision(source, stored, model, layers)
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
    return PruneResult(
        folder=str(output),
        layers=layers,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=memory.peak_bytes,
        calibration_fingerprint=fingerprint,
        warnings=_warnings(settings, calibration),
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
    saliency = SALIENCIES[settings.method]
    _, blocks = find_blocks(model)
    per_block = prunable_layers(model, settings.targets, settings.ignore)
    layers = {name: layer for block in per_block for name, layer in block.items()}
    budgets = settings.budgets(list(layers))
    _check_weights(layers, budgets)

    gradients: dict[str, Tensor] = {}
    if saliency.needs_gradients:
        gradients = gradient_norms(model, layers, samples, settings.gradient_norm, progress)
    replay = BlockReplay(model, blocks, samples) if saliency.needs_activations else None

    results: dict[str, LayerResult] = {}
    for index, block_layers in enumerate(progress.track(per_block, f"pruning ({settings.method})", unit="blocks")):
        block = replay.block(index) if replay else None
        own = {name: gradients.pop(name) for name in block_layers if name in gradients}
        results |= prune_block_(block, block_layers, own, settings, budgets)
        if replay and index + 1 < len(blocks):
            replay.advance(index)
    return results


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
    source: ModelSource, stored: str, pruned: nn.Module, results: dict[str, LayerResult]
) -> nn.Module:
    """The source in its own dtype with the zeros of `pruned`, whatever dtype those were computed in."""
    original: nn.Module = sources.load_model(source, stored)
    for name in results:
        weight = weight_matrix(original.get_submodule(name))
        zeros = weight_matrix(pruned.get_submodule(name)).to(weight.device) == 0
        weight.masked_fill_(zeros | (weight == 0), 0.0)
        remaining = int(torch.count_nonzero(weight))
        if remaining != results[name].nonzeros:
            raise ModelError(
                f"{name}: {results[name].nonzeros} weights survive in the dtype of computation but {remaining} in "
                f"{stored}; compute in a dtype as wide as the checkpoint's"
            )
    return original


def _warnings(settings: PruneSettings, calibration: CalibrationSettings) -> tuple[str, ...]:
    if settings.method == "gblm" and (calibration.samples, calibration.sequence_length) != (128, 2048):
        return (
            f"alpha = {settings.alpha:g} weighs gradients against activations as published only at 128 samples of "
            f"2048 tokens; here it is {calibration.samples} of {calibration.sequence_length}",
        )
    return ()
