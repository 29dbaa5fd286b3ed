"""Pruning of one block: measure, score, mask.

Everything that decides about the weights of a block happens here; the loop over the blocks is in `pruning.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm_compress.allocation import Budget
from gblm_compress.architecture import as_matrix, check_finite, is_transposed, weight_matrix
from gblm_compress.calibration import Block, activation_norms
from gblm_compress.saliency import SALIENCIES, Statistics
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
) -> dict[str, LayerResult]:
    """Prune the layers of one block in place.

    Args:
        block: the block and its inputs; None for a method that looks at no text.
        layers: {name: Linear or Conv1D}, the layers of the block that are to be pruned; may be empty.
        gradients: {name: G in the stored layout of the weight}, for a saliency that needs gradients.
        budgets: {name: how much it keeps}.

    Returns:
        {name: what became of it}.
    """
    activations = activation_norms(block, layers) if block and layers else {}
    results = {}
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach()
        gradient = gradients.get(name)
        statistics = Statistics(
            activation_norm=activations.get(name),
            gradient_norm=None if gradient is None else as_matrix(layer, gradient),
        )
        nonzeros = _prune_layer_(name, weight, statistics, settings, budgets[name])
        out_features, in_features = weight.shape
        results[name] = LayerResult(
            budgets[name].pattern.name, (out_features, in_features), nonzeros, is_transposed(layer)
        )
    return results


def _prune_layer_(name: str, weight: Tensor, statistics: Statistics, settings: PruneSettings, budget: Budget) -> int:
    """Zero the weights [out_features, in_features] that the budget does not keep, in place.

    Returns:
        How many are left.
    """
    magnitude = weight.float()
    score = SALIENCIES[settings.method].score(magnitude, statistics, settings.alpha)
    check_finite(name, "scores", score)
    keep = budget.pattern.mask(score, magnitude, budget.sparsity)
    # A weight that was zero before is written too: it may be -0.0, and a zero here is always +0.0.
    weight.masked_fill_(~keep | (weight == 0), 0.0)
    return int(torch.count_nonzero(weight))
