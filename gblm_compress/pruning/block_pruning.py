"""Pruning of one block: measure, score, mask, fit the survivors. The loop over the blocks is in `walk.py`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block, layer_statistics
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.choices import Statistics
from gblm_compress.methods.fits import FITS, output_error
from gblm_compress.methods.quantisation import QUANTISERS, Grid, check_scales
from gblm_compress.methods.saliency import METHODS, Rule
from gblm_compress.methods.zeros import check_finite, count_nonzeros
from gblm_compress.models.architecture import as_matrix, is_transposed, weight_matrix
from gblm_compress.models.experts import experts_of
from gblm_compress.settings import PruneSettings
from gblm_compress.training.weights import write_

FEW_TOKENS = 32  # An expert with fewer tokens is pruned by magnitude: its statistics are unreliable.
_BY_MAGNITUDE = {"method": "magnitude", "fit": "none"}


@dataclass(frozen=True)
class LayerResult:
    pattern: str
    shape: tuple[int, int]  # (out_features, in_features)
    nonzeros: int  # as they are stored
    transposed: bool  # stored as (in_features, out_features)
    by_magnitude: bool = False  # because its expert got too few tokens
    # `fits.output_error` on the calibration text; None if not measured, or if all survivors were fitted since
    output_error: float | None = None
    survivors: int = 0  # before they were rounded, to a grid or to the dtype of the file; some may have become zero


@dataclass(frozen=True)
class BlockFit:
    run: Callable[..., dict[str, Grid]]  # (block, layers, grids, choose) -> grids, see `reconstruct_`
    put_away: Callable[[Sequence[Tensor]], AbstractContextManager[Callable[[int], Tensor]]]  # of a `StatePool`


@torch.no_grad()
def prune_block_(
    block: Block | None,  # None for a method that reads no text
    layers: dict[str, nn.Module],
    gradients: dict[str, Tensor],  # in the stored layout of the weights, if the method needs them; emptied
    settings: PruneSettings,
    budgets: dict[str, Budget],
    fit: BlockFit | None = None,
) -> tuple[dict[str, LayerResult], dict[str, Grid]]:
    """Prune the layers of one block in place. Returns {name: result}, and {name: grid} of rounded layers.

    A layer that never ran on the text stays as it is. An expert with few tokens is pruned by magnitude.
    """
    statistics = layer_statistics(block, layers, gradients, settings.block_needs)
    gradients.clear()
    few = _with_few_tokens(block, layers, statistics)
    layers = {name: layer for name, layer in layers.items() if name in few or statistics[name].tokens != 0}
    rules = {name: Rule(name, budgets[name].pattern, budgets[name].sparsity, settings.alpha) for name in layers}
    own = {name: settings.model_copy(update=_BY_MAGNITUDE) if name in few else settings for name in layers}
    rounded, again = fit is None, fit is not None and settings.rounds > 1  # the block's fit rounds its own result
    grids: dict[str, Grid] = {}
    survivors: dict[str, int] = {}
    errors: dict[str, float] = {}
    kept, places = _for_errors(layers, statistics) if fit else ([], {})  # else each layer is final at once
    for name, layer in layers.items():
        gram = None if fit else statistics[name].gram
        before = None if gram is None else (weight_matrix(layer).detach().clone(), gram)
        shared = block.ranks if block and own[name].fits.needs else Ranks()  # not what takes less than a sum over ranks
        survivors[name], grid = _prune_layer_(layer, statistics[name], rules[name], own[name], shared, rounded)
        if grid is not None:
            grids[name] = grid
        if before is not None:
            errors[name] = output_error(weight_matrix(layer).detach().float(), *before)
        if not again:
            del statistics[name]  # they take as much memory as a fit

    def choose(name: str, stored: Tensor) -> Tensor:
        values = as_matrix(layers[name], stored)
        selection = METHODS[own[name].method].select(values, statistics[name], rules[name])
        return as_matrix(layers[name], selection.keep)  # back to the stored layout: a transposition undoes itself

    if fit is not None and layers:
        with fit.put_away(kept) as get:
            kept.clear()  # now they are elsewhere
            grids = fit.run(block, layers, grids=grids, choose=choose)
            for name, at in places.items():
                errors[name] = output_error(weight_matrix(layers[name]).detach().float(), *map(get, at))
    results = {}
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach()
        results[name] = LayerResult(
            budgets[name].pattern.name,
            (weight.shape[0], weight.shape[1]),
            count_nonzeros(weight),
            is_transposed(layer),
            by_magnitude=name in few,
            output_error=errors.get(name),
            survivors=survivors[name],
        )
    return results, grids


def _for_errors(
    layers: dict[str, nn.Module], statistics: dict[str, Statistics]
) -> tuple[list[Tensor], dict[str, tuple[int, int]]]:
    """Gram matrices, each once, and dense weights; and the places of each layer's weight and Gram matrix in them."""
    grams = {name: gram for name in layers if (gram := statistics[name].gram) is not None}
    once = {id(gram): gram for gram in grams.values()}
    weights = [weight_matrix(layers[name]).detach().clone() for name in grams]
    places = {name: (len(once) + i, list(once).index(id(gram))) for i, (name, gram) in enumerate(grams.items())}
    return [*once.values(), *weights], places


def _with_few_tokens(
    block: Block | None, layers: dict[str, nn.Module], statistics: dict[str, Statistics]
) -> frozenset[str]:
    """Layers of experts with few tokens; if only gradients are measured, those with none."""
    if block is None:
        measured = {name: one.gradient_norm for name, one in statistics.items()}
        return frozenset(name for name, norm in measured.items() if norm is not None and not norm.any())
    experts = {id(layer) for mixture in experts_of(block.module).values() for layer in mixture.modules()}
    least = min(FEW_TOKENS, block.samples * block.tokens)
    routed = {name: statistics[name].tokens for name, layer in layers.items() if id(layer) in experts}
    return frozenset(name for name, tokens in routed.items() if tokens is not None and tokens < least)


def _prune_layer_(
    layer: nn.Module, statistics: Statistics, rule: Rule, settings: PruneSettings, shared: Ranks, rounded: bool
) -> tuple[int, Grid | None]:
    """Prune a layer in place. Returns how many weights survive, and the grid, to which `rounded` ones go."""
    weight = weight_matrix(layer).detach().float()
    selection, fit = METHODS[settings.method].select(weight, statistics, rule), FITS[settings.fit]
    fitted = selection.fitted.get(settings.fit)
    if fitted is None:
        fitted = shared.by_rows(lambda dense, keep: fit.apply(dense, keep, statistics), weight, selection.keep)
    check_finite(rule.layer, f"weights after --fit {settings.fit}", fitted)
    grid, make = None, QUANTISERS[settings.quantise].make
    if make is not None:
        norm = statistics.activation_norm  # measured for another choice, if at all: no grid asks for text
        importance = None if norm is None else norm.square()
        grid = make(fitted, selection.keep, group=settings.columns_of_a_scale, importance=importance)
        check_scales(rule.layer, grid.scales)
        if on_grid := fit.on_grid:

            def settled(weight: Tensor, fitted: Tensor, keep: Tensor, scales: Tensor) -> Tensor:
                return on_grid(weight, fitted, keep, statistics, replace(grid, scales=scales))

            fitted = shared.by_rows(settled, weight, fitted, selection.keep, grid.scales)
    write_(layer, fitted, grid if rounded else None)
    return count_nonzeros(fitted), grid
