"""The walk over a model that prunes it: backward once for the gradients, then forward, block by block.

    gradients of the dense model ─┐
    for each block:               ├─► score ─► mask ─► zeros, update ─► the block's output feeds the next
      statistics of the block  ───┘
    all survivors at once: distillation, if asked for

It is one walk whether the model is in memory or on disk (`block_weights`), on one process or several (`ranks`), from
the start or from where an interrupted run ended (`run_folder`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.block_calls import BlockCalls
from gblm_compress.calibration.block_weights import Weights
from gblm_compress.calibration.blocks import Block, BlockReplay
from gblm_compress.calibration.gradients import Wanted, gradient_norms, token_weights
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.whole_calls import WholeCalls, calls_of
from gblm_compress.errors import ModelError
from gblm_compress.methods.allocation import ALLOCATIONS, Budget
from gblm_compress.methods.choices import Need
from gblm_compress.methods.patterns import DENSE
from gblm_compress.methods.quantisation import Grid
from gblm_compress.methods.zeros import check_finite
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.progress import Progress
from gblm_compress.pruning.block_pruning import LayerResult, layer_result, prune_block_
from gblm_compress.pruning.budgeting import budgets as layer_budgets
from gblm_compress.pruning.budgeting import uniform_budgets
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.settings import PruneSettings
from gblm_compress.tasks.task import Sample, Task
from gblm_compress.training.distillation import distil_
from gblm_compress.training.distillation import predictions as dense_predictions


@dataclass(frozen=True)
class Walk:
    """One pruning of one model.

    Attributes:
        weights: the dense model; in memory it is pruned in place.
        task: what the model is for.
        samples: those of this process; may be empty for a method that needs no text.
        settings: what to prune and how.
        run: where finished work is kept; what is there already is not done again.
        pool: where hidden states are kept.
        ranks: the processes that share the samples.
        by_sample: in which order gradients are measured, see `gradients`; nothing else depends on it.
    """

    weights: Weights
    task: Task
    samples: Sequence[Sample]
    settings: PruneSettings
    run: RunFolder
    pool: StatePool
    progress: Progress
    ranks: Ranks
    by_sample: bool = False

    def prune_(self) -> dict[str, LayerResult]:
        """Prune every block and leave it finished in the run folder.

        Returns:
            {layer name: what became of it}.

        Raises:
            ModelError: a value is NaN or infinite, or the architecture is not supported.
            UsageError: a width does not divide by M, or a name pattern matches nothing.
        """
        with chunked_attention():
            return self._prune_()

    def _prune_(self) -> dict[str, LayerResult]:
        settings = self.settings
        layers = prunable_layers(self.weights.model, settings.targets, settings.ignore)
        self._check(layers)
        if not settings.needs_text:
            return self._with(None, layers)
        weights, calls = calls_of(self.weights, self.task, self.samples)
        if settings.guidance and isinstance(calls, WholeCalls):
            raise ModelError("guidance is for models whose blocks run one by one, and these do not; leave it out")
        return replace(self, weights=weights)._with(calls, weights.per_block(layers))

    def _with(self, calls: BlockCalls | None, layers: list[dict[str, nn.Module]]) -> dict[str, LayerResult]:
        settings = self.settings
        if settings.runs_backward:
            assert calls is not None
            self._measure_gradients(calls, layers)
        budgets = self.run.budgets
        if budgets is None:
            budgets = self.run.budgets = layer_budgets(layers, settings, self._dense_blocks(calls))
        layers = [
            {name: layer for name, layer in block.items() if budgets[name].pattern.name != DENSE} for block in layers
        ]
        predictions = []
        if settings.distillation_epochs and not self.run.distilled:
            predictions = dense_predictions(self.weights.model, self.task, self.samples, self.progress)
        results = self._prune_blocks_(calls, layers, budgets)
        if predictions:
            pruned = [{name: layer for name, layer in block.items() if name in results} for block in layers]
            results = self._distil_(pruned, budgets, predictions)
        return results

    def _check(self, layers: list[dict[str, nn.Module]]) -> None:
        """Find every reason not to start before the minutes of calibration begin."""
        uniform_budgets({name: layer for block in layers for name, layer in block.items()}, self.settings)
        for index, block in enumerate(layers):
            with self.weights.block(index):
                for name, layer in block.items():
                    check_finite(name, "weights", weight_matrix(layer).detach())

    def _measure_gradients(self, calls: BlockCalls, layers: list[dict[str, nn.Module]]) -> None:
        known = frozenset(index for index in range(len(layers)) if self.run.has_gradients(index))
        gradient_norms(
            self.weights,
            calls,
            layers,
            Wanted(self.settings.gradient_norm if self.settings.needs_gradients else None, self.settings.guidance > 0),
            self.pool,
            self.run.save_gradients,
            self.progress,
            self.ranks,
            skip=known,
            by_sample=self.by_sample,
        )

    def _dense_blocks(self, calls: BlockCalls | None) -> Iterator[tuple[Block | None, dict[str, Tensor]]]:
        """Every block of the dense model, for the allocation; measured only if it asks."""
        replay = None
        if ALLOCATIONS[self.settings.allocation].needs & Need.BLOCKS:
            assert calls is not None
            replay = BlockReplay(calls, self.weights, self.pool, self.ranks)
        blocks = range(len(self.weights.blocks))
        for index in self.progress.track(blocks, f"allocation ({self.settings.allocation})", "blocks"):
            with self.weights.block(index):
                yield replay.block(index) if replay else None, self._gradients(index)
                if replay:
                    replay.advance(index)
        if replay:
            replay.hidden.release()

    def _gradients(self, index: int) -> dict[str, Tensor]:
        return {name: norms.to(self.pool.device) for name, norms in self.run.gradients(index).items()}

    def _guided(self, block: Block, index: int) -> Block:
        """The block with weights of its tokens, where the settings ask for them."""
        weights = {
            name: self.ranks.share(list(token_weights(felt.to(self.pool.device), self.settings.guidance)))
            for name, felt in self.run.felt(index).items()
        }
        return replace(block, token_weights=weights)

    def _prune_blocks_(
        self, calls: BlockCalls | None, layers: list[dict[str, nn.Module]], budgets: dict[str, Budget]
    ) -> dict[str, LayerResult]:
        settings, run = self.settings, self.run
        replay = dense = None
        if settings.needs_blocks:
            assert calls is not None
            replay = BlockReplay(calls, self.weights, self.pool, self.ranks)
            if settings.fits_blocks:
                dense = BlockReplay(calls, self.weights, self.pool, self.ranks)
        results: dict[str, LayerResult] = {}
        # What goes into a block is needed as long as a block from there on is still to be pruned.
        last = max((index for index in range(len(layers)) if not run.has_finished(index)), default=-1)
        tokens = calls.tokens if calls else 0
        blocks = range(len(layers))
        for index in self.progress.track(blocks, f"pruning ({settings.method})", "blocks", tokens=tokens):
            with self.weights.block(index):
                if dense and index <= last:
                    dense.advance(index)
                if run.has_finished(index):
                    _overlay_(layers[index], run.finished(index))
                    known = set(run.layers(index))  # in the order of the model, not of the file
                    found = {name: layer for name, layer in layers[index].items() if name in known}
                    results |= self._results(found, budgets)
                else:
                    pruned, grids = prune_block_(
                        self._guided(replay.block(index), index) if replay else None,
                        layers[index],
                        self._gradients(index),
                        settings,
                        budgets,
                        dense.hidden if dense else (),
                    )
                    results |= pruned
                    by_magnitude = [name for name, result in pruned.items() if result.by_magnitude]
                    errors = {
                        name: result.output_error for name, result in pruned.items() if result.output_error is not None
                    }
                    kept = _weights({name: layers[index][name] for name in pruned})
                    run.finish(index, kept, grids, by_magnitude, errors)
                if replay and index < last:
                    replay.advance(index)
        return results

    def _distil_(
        self, layers: list[dict[str, nn.Module]], budgets: dict[str, Budget], predictions: list[Tensor]
    ) -> dict[str, LayerResult]:
        pruned = {name: layer for block in layers for name, layer in block.items()}
        on: dict[str, Grid] = {}
        for block in range(len(layers)):
            for name, grid in self.run.grids(block, self.settings.columns_of_a_scale).items():
                on[name] = grid.to(pruned[name].weight.device)
        _, grids = distil_(
            self.weights.model,
            pruned,
            self.task,
            self.samples,
            predictions,
            epochs=self.settings.distillation_epochs,
            rate=self.settings.distillation_rate,
            compute=self.settings.fit_dtype,
            progress=self.progress,
            grids=on,
        )
        self.run.finish_distilled([_weights(block) for block in layers], grids)
        return self._results(pruned, budgets)

    def _results(self, layers: dict[str, nn.Module], budgets: dict[str, Budget]) -> dict[str, LayerResult]:
        by_magnitude, errors = self.run.by_magnitude, self.run.output_errors
        return {
            name: layer_result(layer, budgets[name], name in by_magnitude, errors.get(name))
            for name, layer in layers.items()
        }


def _weights(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {name: layer.get_parameter("weight").detach() for name, layer in layers.items()}


@torch.no_grad()
def _overlay_(layers: dict[str, nn.Module], finished: dict[str, Tensor]) -> None:
    for name, weight in finished.items():
        layers[name].get_parameter("weight").copy_(weight)
