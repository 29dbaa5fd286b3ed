"""Pruning of one block: measure, score, mask, fit the survivors.

Everything that decides about the weights of a block happens here; the loop over the blocks is in `walk.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block, layer_statistics
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.choices import Statistics
from gblm_compress.methods.fits import BLOCK_EPOCHS, BLOCK_RATE, FITS, output_error
from gblm_compress.methods.quantisation import QUANTISERS, Grid
from gblm_compress.methods.saliency import METHODS, Rule
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models.architecture import as_matrix, is_transposed, weight_matrix
from gblm_compress.models.experts import experts_of
from gblm_compress.settings import PruneSettings
from gblm_compress.training.fits import How, reconstruct_
from gblm_compress.training.weights import write_

FEW_TOKENS = 32
"""An expert that fewer tokens of the text are routed to is pruned by magnitude: its statistics say little."""

_BY_MAGNITUDE = {"method": "magnitude", "fit": "none"}


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        pattern: the pattern it satisfies.
        shape: (out_features, in_features).
        nonzeros: how many weights are left.
        transposed: whether the folder stores it as (in_features, out_features).
        by_magnitude: whether it was pruned by magnitude, because its expert got too few tokens.
        output_error: how far its output on the calibration text is from that of its dense weights, as a share of it
            (`methods.fits.output_error`); None where no Gram matrix was measured, or the whole model was fitted since.
    """

    pattern: str
    shape: tuple[int, int]
    nonzeros: int
    transposed: bool
    by_magnitude: bool = False
    output_error: float | None = None


@dataclass(frozen=True)
class Target:
    """What a block is fitted to.

    Attributes:
        outputs: of the block in the dense model, for every sample.
        products: the dtype of the products in the fit, float32 or bfloat16.
    """

    outputs: Sequence[Tensor]
    products: str


@torch.no_grad()
def prune_block_(
    block: Block | None,
    layers: dict[str, nn.Module],
    gradients: dict[str, Tensor],
    settings: PruneSettings,
    budgets: dict[str, Budget],
    target: Target | None = None,
) -> tuple[dict[str, LayerResult], dict[str, Grid]]:
    """Prune the layers of one block in place.

    Args:
        block: the block and its inputs; None for a method that looks at no text.
        layers: {name: Linear or Conv1D}, the layers of the block that are to be pruned; may be empty.
        gradients: {name: G in the stored layout of the weight}, for a saliency that needs gradients.
        budgets: {name: how much it keeps}.
        target: needed where the block is fitted, else unused.

    Returns:
        {name: what became of it}, and {name: grid} of the layers whose survivors lie on one. A layer that never ran on
        the text is not among them and stays as it is; an expert with too few tokens is pruned by magnitude.
    """
    statistics = layer_statistics(block, layers, gradients, settings.block_needs)
    few = _with_few_tokens(block, layers, statistics)
    layers = {name: layer for name, layer in layers.items() if name in few or statistics[name].tokens != 0}
    alpha = settings.effective_alpha(block.samples, block.tokens) if block else settings.alpha
    rules = {name: Rule(name, budgets[name].pattern, budgets[name].sparsity, alpha) for name in layers}
    own = {name: settings.model_copy(update=_BY_MAGNITUDE) if name in few else settings for name in layers}
    grids: dict[str, Grid] = {}
    dense = {
        name: weight_matrix(layer).detach().clone()
        for name, layer in layers.items()
        if statistics[name].gram is not None
    }
    for name, layer in layers.items():
        values, grid = _prune_layer(weight_matrix(layer).detach().float(), statistics[name], rules[name], own[name])
        write_(layer, values, None if settings.fits_blocks else grid)  # a fit of the block rounds what it leaves
        if grid is not None:
            grids[name] = grid

    def choose(name: str, stored: Tensor) -> Tensor:
        values = as_matrix(layers[name], stored)
        selection = METHODS[own[name].method].select(values, statistics[name], rules[name])
        return as_matrix(layers[name], selection.keep)  # back to the stored layout: a transposition undoes itself

    if settings.fits_blocks and layers:
        assert block is not None and target is not None
        how = How(BLOCK_EPOCHS, BLOCK_RATE, target.products, settings.rounds)
        grids = reconstruct_(block, layers, target.outputs, how, grids, choose).grids
    errors = {
        name: output_error(weight.float(), weight_matrix(layers[name]).detach().float(), statistics[name].moments())
        for name, weight in dense.items()
    }
    results = {
        name: layer_result(layer, budgets[name], name in few, errors.get(name)) for name, layer in layers.items()
    }
    return results, grids


def _with_few_tokens(
    block: Block | None, layers: dict[str, nn.Module], statistics: dict[str, Statistics]
) -> frozenset[str]:
    """The layers of experts that too few tokens were routed to; where gradients alone are measured, those without."""
    if block is None:
        measured = {name: one.gradient_norm for name, one in statistics.items()}
        return frozenset(name for name, norm in measured.items() if norm is not None and not norm.any())
    experts = {id(layer) for mixture in experts_of(block.module).values() for layer in mixture.modules()}
    least = min(FEW_TOKENS, block.samples * block.tokens)
    routed = {name: statistics[name].tokens for name, layer in layers.items() if id(layer) in experts}
    return frozenset(name for name, tokens in routed.items() if tokens is not None and tokens < least)


def _prune_layer(
    weight: Tensor, statistics: Statistics, rule: Rule, settings: PruneSettings
) -> tuple[Tensor, Grid | None]:
    """The pruned and fitted weight of one layer, [out_features, in_features] in float32, and the grid on whose nearest
    points its survivors are to lie, if any.
    """
    selection, fit = METHODS[settings.method].select(weight, statistics, rule), FITS[settings.fit]
    fitted = selection.fitted.get(settings.fit)
    if fitted is None:
        fitted = fit.apply(weight, selection.keep, statistics)
    make = QUANTISERS[settings.quantise].make
    if make is None:
        return fitted, None
    norm = statistics.activation_norm  # where it is measured for something else: no grid asks for text
    importance = None if norm is None else norm.square()
    grid = make(fitted, selection.keep, group=settings.columns_of_a_scale, importance=importance)
    return fit.on_grid(weight, fitted, selection.keep, statistics, grid), grid


def layer_result(
    layer: nn.Module, budget: Budget, by_magnitude: bool, output_error: float | None = None
) -> LayerResult:
    """What a pruned layer is like now."""
    weight = weight_matrix(layer).detach()
    shape, nonzeros = (weight.shape[0], weight.shape[1]), count_nonzeros(weight)
    return LayerResult(budget.pattern.name, shape, nonzeros, is_transposed(layer), by_magnitude, output_error)
