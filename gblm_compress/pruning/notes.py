"""What a user should know of settings and model beside the result."""

import math

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.fits import FITS
from gblm_compress.models import manifest
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning import costs
from gblm_compress.pruning.block_pruning import FEW_TOKENS, LayerResult
from gblm_compress.pruning.placement import Placement
from gblm_compress.pruning.saving import Walked
from gblm_compress.settings import PUBLISHED_CALIBRATION, CalibrationSettings, PruneSettings


def pruned_before(source: ModelSource) -> list[str]:
    """What to say about a source that this program has pruned already."""
    if not manifest.is_pruned(source.folder):
        return []
    layers = manifest.read(source.folder).get("layers", {}).values()
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    zeros = 1 - sum(layer["nonzeros"] for layer in layers) / weights
    patterns = ", ".join(sorted({layer["pattern"] for layer in layers}))
    return [
        f"{source.name} is pruned already ({patterns}, {100 * zeros:.1f} % zeros); zeros stay zeros, so that a lower "
        "sparsity does nothing: prune the dense model to change method or pattern"
    ]


def closing_notes(
    settings: PruneSettings,
    calibration: CalibrationSettings,
    layers: dict[str, LayerResult],
    walked: Walked,
    seconds: float,
    placement: Placement,
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
    if walked.whole:
        notes.append(
            "the blocks of this architecture repeat, share weights or pass more on than hidden states, so that all "
            "layers were measured in the dense model at once"
        )
    if few := [name for name, layer in layers.items() if layer.by_magnitude]:
        notes.append(
            f"{len(few)} layers of experts got fewer than {FEW_TOKENS} tokens of the text and were pruned by "
            f"magnitude, first {few[0]} (more --samples reach more experts, --experts all sends every "
            "token to all of them)"
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
    able = ["fast"] if group.size > 1 else [name for name in FITS if name != "best" or not placement.offload]
    better = costs.better_fit(settings, able)
    kept = settings.model_dump(exclude={"preset", "fit", "update", "distillation_epochs"}, exclude_defaults=True)
    cost = costs.passes(PruneSettings(**kept, fit=better)) / costs.passes(settings) if better else 0.0
    if cost > 1:
        notes.append(
            f"--fit {better} fits the surviving weights further and gives a better model at the same size; it takes "
            f"about {cost:.1f} times as long (estimated from its passes over the text: {cost * seconds:,.0f} s)"
        )
    if mask := costs.better_method(settings):
        ours, other = (costs.MASKS[settings.fit or ""][method] for method in (settings.method, mask))
        notes.append(
            f"--method {mask} chose a better mask for this fit where it was measured: perplexity {other:g} against "
            f"{ours:g} (SmolLM2-135M, 2:4)"
        )
    return tuple(notes)
