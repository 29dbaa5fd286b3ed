"""Pruning of one block: measure, score, mask, refine the mask, update the survivors.

Everything that decides about the weights of a block happens here; the loop over the blocks is in `walk.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm_compress.calibration.block_statistics import gram_matrices, regional_norms
from gblm_compress.calibration.blocks import Block, activation_norms
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.gram import activation_norms_of
from gblm_compress.methods.refinement import swap
from gblm_compress.methods.saliency import SALIENCIES, Statistics
from gblm_compress.methods.updates import least_squares, obs, sparsegpt
from gblm_compress.methods.zeros import count_nonzeros, keep_only, positive_zeros
from gblm_compress.models.architecture import as_matrix, check_finite, is_transposed, weight_matrix
from gblm_compress.pruning.reconstruction import reconstruct_
from gblm_compress.settings import PruneSettings


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        pattern: the pattern it satisfies.
        shape: (out_features, in_features).
        nonzeros: how many weights are left.
        transposed: whether the folder stores it as (in_features, out_features).
    """

    pattern: str
    shape: tuple[int, int]
    nonzeros: int
    transposed: bool


@torch.no_grad()
def prune_block_(
    block: Block | None,
    layers: dict[str, nn.Module],
    gradients: dict[str, Tensor],
    settings: PruneSettings,
    budgets: dict[str, Budget],
    targets: Sequence[Tensor] = (),
) -> dict[str, LayerResult]:
    """Prune the layers of one block in place.

    Args:
        block: the block and its inputs; None for a method that looks at no text.
        layers: {name: Linear or Conv1D}, the layers of the block that are to be pruned; may be empty.
        gradients: {name: G in the stored layout of the weight}, for a saliency that needs gradients.
        budgets: {name: how much it keeps}.
        targets: the block's outputs in the dense model for every sample; needed to reconstruct it, else unused.

    Returns:
        {name: what became of it}.
    """
    statistics = _statistics(block, layers, gradients, settings)
    alpha = settings.effective_alpha(block.samples, block.inputs[0].shape[1]) if block else settings.alpha
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach()
        pruned = _prune_layer(name, weight.float(), statistics[name], settings, budgets[name], alpha)
        weight.copy_(positive_zeros(pruned.to(weight.dtype)))  # only now: a small weight may have become -0.0

    def choose(name: str, stored: Tensor) -> Tensor:
        values = as_matrix(layers[name], stored)
        keep = _mask(name, values, statistics[name], settings, budgets[name], alpha)
        return as_matrix(layers[name], keep)  # back to the stored layout: a transposition undoes itself

    if settings.update == "reconstruct" and layers:
        assert block is not None and len(targets) == len(block.inputs), "the loop must pass the dense outputs"
        reconstruct_(
            block,
            layers,
            targets,
            epochs=settings.reconstruction_epochs,
            rate=settings.reconstruction_rate,
            compute=settings.fit_dtype,
            rounds=settings.reconstruction_rounds,
            choose=choose,
        )
    return {name: layer_result(layer, budgets[name]) for name, layer in layers.items()}


def _statistics(
    block: Block | None, layers: dict[str, nn.Module], gradients: dict[str, Tensor], settings: PruneSettings
) -> dict[str, Statistics]:
    """What the settings need to know of each layer; weights' statistics as [out_features, in_features]."""
    saliency = SALIENCIES[settings.method]
    grams: dict[str, Tensor] = {}
    activations: dict[str, Tensor] = {}
    regional: dict[str, Tensor] = {}
    if block is not None and layers:
        if settings.needs_gram:
            grams = gram_matrices(block, layers)
            activations = {name: activation_norms_of(gram, block.samples) for name, gram in grams.items()}
        elif saliency.needs_activations:
            activations = activation_norms(block, layers)
        if saliency.needs_regional:
            regional = regional_norms(block, layers)

    def matrix(layer: nn.Module, stored: Tensor | None) -> Tensor | None:
        return None if stored is None else as_matrix(layer, stored)

    return {
        name: Statistics(
            activation_norm=activations.get(name),
            gradient_norm=matrix(layer, gradients.get(name)),
            regional_norm=matrix(layer, regional.get(name)),
            gram=grams.get(name),
        )
        for name, layer in layers.items()
    }


def _prune_layer(
    name: str, weight: Tensor, statistics: Statistics, settings: PruneSettings, budget: Budget, alpha: float
) -> Tensor:
    """The pruned and updated weight of one layer, [out_features, in_features] in float32.

    Reconstruction starts from the least-squares solution.
    """
    pattern, gram = budget.pattern, statistics.gram
    if settings.method == "obs" and settings.update == "obs" and settings.refine == "none":
        assert gram is not None
        return sparsegpt(weight, gram, pattern, budget.sparsity, settings.damping)[0]
    keep = _mask(name, weight, statistics, settings, budget, alpha)
    if settings.update == "none":
        return keep_only(weight, keep)
    assert gram is not None
    update = obs if settings.update == "obs" else least_squares
    return update(weight, keep, gram, settings.damping)


def _mask(
    name: str, weight: Tensor, statistics: Statistics, settings: PruneSettings, budget: Budget, alpha: float
) -> Tensor:
    """Which weights of a layer survive, [out_features, in_features], True = keep."""
    score = SALIENCIES[settings.method].score
    if score is None:
        assert statistics.gram is not None
        keep = sparsegpt(weight, statistics.gram, budget.pattern, budget.sparsity, settings.damping)[1]
    else:
        scores = score(weight, statistics, alpha)
        check_finite(name, "scores", scores)
        keep = budget.pattern.mask(scores, weight, budget.sparsity)
    if settings.refine == "swap":
        assert statistics.gram is not None
        keep = swap(weight, keep, statistics.gram, budget.pattern)
    return keep


def layer_result(layer: nn.Module, budget: Budget) -> LayerResult:
    """What a pruned layer is like now."""
    weight = weight_matrix(layer).detach()
    out_features, in_features = weight.shape
    return LayerResult(budget.pattern.name, (out_features, in_features), count_nonzeros(weight), is_transposed(layer))
