"""Fits on the calibration samples: one block to the dense block's output, or all layers to the dense predictions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.quantisation import Grid
from gblm_compress.methods.zeros import keep_only, positive_zeros
from gblm_compress.progress import Progress
from gblm_compress.training.imitation import Imitation, autocast
from gblm_compress.training.trainer import Plan, Trainer
from gblm_compress.training.weights import Weights

HELD_OUT_EVERY = 8
BATCH = 2  # samples in a step, at least
PATIENCE = 2  # epochs without improvement that end a fit


@dataclass(frozen=True)
class How:
    """Settings of a fit. Products have the dtype `compute`. Each of the `rounds` fits the block with a new mask."""

    epochs: int
    rate: float
    compute: str
    rounds: int = 1

    def plan(self, samples: int, name: str, ranks: Ranks) -> Plan:
        """Hold out every 8th sample; also train on a single one. A step takes equally many samples of every process."""
        held_out = list(range(HELD_OUT_EVERY - 1, samples, HELD_OUT_EVERY)) or [samples - 1]
        training = [index for index in range(samples) if index not in held_out] or held_out
        shares = [Ranks(rank, ranks.size).share(range(samples)) for rank in range(ranks.size)]
        generator, each = torch.Generator().manual_seed(0), math.ceil(BATCH / ranks.size)
        steps = []
        for _ in range(self.epochs):
            order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
            own = [[index for index in order if index in share] for share in shares]
            starts = range(0, max(map(len, own)), each)
            steps += [[index for some in own for index in some[start : start + each]] for start in starts]
        return Plan(
            steps,
            held_out,
            self.rate,
            look_every=len(steps) // self.epochs,
            patience=PATIENCE,
            own=shares[ranks.rank],
            name=name,
            advice="compute in a wider range with --dtype float32, or choose --fit fast",
        )


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖output − target‖² / ‖target‖²; both [..., tokens, hidden size]."""
    # Every token counts alike, as the next block normalises it.
    output, target = output.float(), target.float()
    scale = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output - target).square().sum(-1) / scale).mean()


def reconstruct_(
    block: Block,
    layers: Mapping[str, nn.Module],
    targets: Sequence[Tensor],  # the dense block's outputs, each [1, length, hidden size]
    how: How,
    grids: Mapping[str, Grid],
    choose: Callable[[str, Tensor], Tensor],  # (name, values in the stored layout) -> mask
) -> dict[str, Grid]:
    """Fit the surviving weights of a pruned block by Adam, in place (regional optimisation, Wanda++, arXiv 2503.04992).

    All rounds but the last also train pruned weights, and then `choose` finds the next mask. The round with the lowest
    validation error is kept. `grids` are for the layers to round; they are returned with fitted scales.
    """

    def loss(indices: Sequence[int]) -> Tensor:
        (index,) = indices
        hidden = block.inputs[index]
        with autocast(hidden.device, how.compute):
            output = block.calls[index].run(block.module, hidden)
        return relative_error(block.without_padding(index, output), block.without_padding(index, targets[index]))

    ranks, least = block.ranks, math.inf
    plan = how.plan(block.samples, f"the fit of the block of {next(iter(layers))}", ranks)
    start: dict[str, tuple[Tensor, Tensor | None]]
    start = {name: (layer.get_parameter("weight").detach(), None) for name, layer in layers.items()}
    with _wide(layers, how.compute):
        for left in reversed(range(how.rounds)):
            masks = {name: one != 0 for name, (one, _) in start.items()}
            weights = Weights(layers, grids, start=start, revive=left > 0, ranks=ranks)
            progress = Trainer(block.module, weights, loss, plan).run()
            found = progress.curve[progress.best].held_out
            if found < least and left == 0:
                return weights.finish()
            values = weights.values
            if found < least:
                least = found
                best = {name: (keep_only(one, masks[name]), factors) for name, (one, factors) in values.items()}
            if left == 0 or progress.best == 0:  # without improvement, later rounds would repeat this one
                break
            start = {name: (keep_only(one, choose(name, one)), factors) for name, (one, factors) in values.items()}
        return Weights(layers, grids, start=best, ranks=ranks).finish()


def distil_(
    layers: Mapping[str, nn.Module],
    loss: Imitation,
    how: How,
    grids: Mapping[str, Grid],
    ranks: Ranks,
    progress: Progress,
) -> dict[str, Grid]:
    """Fit the surviving weights of all layers by Adam, in place; returns `grids` with fitted scales."""
    plan = how.plan(ranks.total(len(loss.samples)), "the fit of the whole model", ranks)
    with _wide(layers, how.compute), progress.counter("distilling", "steps", len(plan.steps)) as advance:
        weights = Weights(layers, grids, ranks=ranks)
        Trainer(loss.model, weights, loss, plan).run(advance)
        return weights.finish()


@contextmanager
def _wide(layers: Mapping[str, nn.Module], compute: str) -> Iterator[None]:
    """Hold float16 weights in float32 while products are bfloat16: float16 gradients would underflow."""
    weights = [layer.get_parameter("weight") for layer in layers.values()] if compute == "bfloat16" else []
    narrow = {weight: weight.data for weight in weights if weight.dtype is torch.float16}
    for weight in narrow:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, stored in narrow.items():
            stored.copy_(positive_zeros(weight.data.half()))
            weight.data = stored
