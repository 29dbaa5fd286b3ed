"""The walk over a model that prunes it: backward once for the gradients, then forward, block by block.

gradients of the dense model ─┐
for each block:               ├─► score ─► mask ─► zeros, fit ─► the block's output feeds the next
  statistics of the block  ───┘
all survivors at once: distillation, if asked for
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.blocks import BlockReplay, layer_statistics
from gblm_compress.calibration.calls import BlockCalls, calls_of
from gblm_compress.calibration.gradients import GradientPass
from gblm_compress.calibration.weights import HiddenStates, StatePool, Weights
from gblm_compress.methods.allocation import Budget, DenseLayer, spread
from gblm_compress.methods.choices import Need
from gblm_compress.methods.fits import BLOCK_EPOCHS, BLOCK_RATE, MODEL_EPOCHS, MODEL_RATE
from gblm_compress.methods.patterns import DENSE
from gblm_compress.methods.quantisation import check_scales, scales_of
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models.architecture import linear_weights, prunable_layers, weight_matrix
from gblm_compress.progress import Progress
from gblm_compress.pruning.block_pruning import BlockFit, LayerResult, prune_block_
from gblm_compress.pruning.planning import Plan
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.training.fits import How, distil_, reconstruct_
from gblm_compress.training.imitation import Imitation, prediction

UNSEEN, EXCEPTED = "never ran on the calibration text", "left dense by an exception or the allocation"
Layers = list[dict[str, nn.Module]]  # of each block, by full name


@dataclass(frozen=True)
class LeftDense:
    """A linear layer, or a tensor of fused ones, that was not pruned."""

    weights: int
    reason: str


@dataclass(frozen=True)
class Walked:
    plan: Plan
    layers: dict[str, LayerResult]
    left_dense: dict[str, LeftDense]  # all other linear weights of the model
    exceptions: frozenset[str]  # layers that an exception or the allocation left dense
    whole: bool  # all blocks of the model were pruned as one


@dataclass(frozen=True)
class Walk:
    plan: Plan
    weights: Weights  # of the dense model
    run: RunFolder  # finished work, which is not done again
    pool: StatePool  # of hidden states
    progress: Progress
    calls: BlockCalls | None = None  # if the settings need text

    def prune_(self) -> Walked:
        """Prune every block and leave it finished in the run folder. A model in memory is pruned in place."""
        settings, model, blocks = self.plan.settings, self.weights.model, len(self.weights.blocks)
        layers = prunable_layers(model, settings.ignore)
        for index, block in enumerate(layers) if settings.grid else ():  # before the minutes of calibration begin
            with self.weights.block(index):
                for name, layer in block.items():
                    weight = weight_matrix(layer).detach().float()
                    check_scales(name, scales_of(weight, settings.columns_of_a_scale))
        with chunked_attention():
            if settings.needs_text:
                weights, calls, layers = calls_of(self.weights, self.plan.task, self.plan.samples, layers)
                results = replace(self, weights=weights, calls=calls)._blocks_(layers)
            else:
                with self.weights.outer():  # reads and so checks it, like the blocks
                    pass
                results = self._blocks_(layers)
        budgets = self.run.record.budgets or {}
        dense = {name for name, budget in budgets.items() if not settings.changes(budget.pattern)}
        left_dense = {
            name: LeftDense(count, reason or (EXCEPTED if name in dense else UNSEEN))
            for name, count, reason in linear_weights(model, settings.ignore)
            if name not in results
        }
        return Walked(self.plan, results, left_dense, frozenset(dense), whole=len(self.run.record.blocks) < blocks)

    def _blocks_(self, layers: Layers) -> dict[str, LayerResult]:
        plan, run = self.plan, self.run
        if plan.settings.needs_gradients:
            self._measure_gradients(layers)
        budgets = run.record.budgets
        if budgets is None:
            budgets = run.record.budgets = self._budgets(layers)
            run.write()
        layers = [
            {name: layer for name, layer in block.items() if plan.settings.changes(budgets[name].pattern)}
            for block in layers
        ]
        dense = []
        if plan.settings.fits.fits_model and not run.is_distilled:
            samples = self.progress.track(plan.samples, "dense predictions", unit="samples")
            dense = [prediction(self.weights.model, plan.task, [sample]) for sample in samples]
        self._prune_blocks_(layers, budgets)
        if dense:
            pruned = [{name: layer for name, layer in block.items() if name in run.results} for block in layers]
            self._distil_(pruned, dense)
        return run.results

    def _measure_gradients(self, layers: Layers) -> None:
        assert self.calls is not None
        plan, run = self.plan, self.run
        measuring = GradientPass(self.weights, self.calls, self.pool, plan.ranks, self.progress)
        wanted = {i: block for i, block in enumerate(layers) if block and not run.has_gradients(i)}
        for block, norms in measuring.norms(wanted, plan.settings.gradient_norm, plan.placement.by_sample):
            run.save_gradients(block, norms)
            norms.clear()  # else they would stay in memory beside those of the next block

    def _budgets(self, layers: Layers) -> dict[str, Budget]:
        settings, uniform = self.plan.settings, self.plan.budgets
        free = [{name: layer for name, layer in block.items() if not settings.is_exception(name)} for block in layers]
        if not any(free):
            return uniform
        densities = settings.allocates.densities(self._dense_blocks(free), 1 - settings.uniform_budget.sparsity)
        if not densities:
            return uniform
        sizes = {name: weight_matrix(layer).numel() for block in free for name, layer in block.items()}
        return uniform | spread(settings.uniform_budget, sizes, densities)

    def _dense_blocks(self, layers: Layers) -> Iterator[Iterator[DenseLayer]]:
        """Every block of the dense model, with the statistics that the allocation needs."""
        needs, what = self.plan.settings.allocates.needs, f"allocation ({self.plan.settings.allocation})"
        replay = self._replay() if needs & Need.BLOCKS else None
        for index in self.progress.track(range(len(layers)), what, "blocks"):
            with self.weights.block(index):
                block = replay.block(index) if replay else None
                found = layer_statistics(block, layers[index], self._gradients(index), needs)
                weights = ((name, weight_matrix(layer).detach().float()) for name, layer in layers[index].items())
                yield (DenseLayer(name, weight, found[name]) for name, weight in weights)
                if replay:
                    replay.advance(index)
        if replay:
            replay.hidden.release()

    def _gradients(self, index: int) -> dict[str, Tensor]:
        return {name: norms.to(self.pool.device) for name, norms in self.run.gradients(index).items()}

    def _replay(self) -> BlockReplay:
        assert self.calls is not None
        return BlockReplay(self.calls, self.weights, self.pool, self.plan.ranks)

    def _prune_blocks_(self, layers: Layers, budgets: dict[str, Budget]) -> None:
        settings, run = self.plan.settings, self.run
        replay = self._replay() if settings.needs_blocks else None
        dense = self._replay() if settings.fits.fits_block else None
        # Inputs are needed up to the last block that is still to be pruned.
        last = max((index for index in range(len(layers)) if not run.has_finished(index)), default=-1)
        tokens = self.calls.tokens if self.calls else 0
        what = f"rounding ({settings.quantise})" if settings.pattern == DENSE else f"pruning ({settings.method})"
        for index in self.progress.track(range(len(layers)), what, "blocks", tokens=tokens):
            with self.weights.block(index):
                if dense and index <= last:
                    dense.advance(index)
                if run.has_finished(index):
                    for name in run.record.blocks[index]:
                        layers[index][name].get_parameter("weight").data.copy_(run.finished(index, name))
                else:
                    block = replay.block(index) if replay else None
                    fit = self._fit(dense.hidden) if dense else None
                    results, grids = prune_block_(block, layers[index], self._gradients(index), settings, budgets, fit)
                    run.finish(index, _weights({name: layers[index][name] for name in results}), grids, results)
                if replay and index < last:
                    replay.advance(index)

    def _fit(self, targets: HiddenStates) -> BlockFit:
        how = How(BLOCK_EPOCHS, BLOCK_RATE, self.plan.products, self.plan.settings.rounds)
        return BlockFit(partial(reconstruct_, targets=targets, how=how), self.pool.put_away)

    def _distil_(self, layers: Layers, dense: list[Tensor]) -> None:
        plan, run, device = self.plan, self.run, self.plan.device
        pruned = {name: layer for block in layers for name, layer in block.items()}
        on = {name: grid.to(device) for name, grid in run.grids(plan.settings.columns_of_a_scale).items()}
        loss = Imitation(self.weights.model, plan.task, plan.samples, lambda some: dense[some[0]], plan.products)
        grids = distil_(pruned, loss, How(MODEL_EPOCHS, MODEL_RATE, plan.products), on, plan.ranks, self.progress)
        results = {
            name: replace(before, nonzeros=count_nonzeros(pruned[name].get_parameter("weight")), output_error=None)
            for name, before in run.results.items()
        }
        run.finish_distilled([_weights(block) for block in layers], grids, results)


def _weights(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {name: layer.get_parameter("weight").detach() for name, layer in layers.items()}
