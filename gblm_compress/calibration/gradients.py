"""Gradient norms of the dense model's weights, in one of two orders, to the same bits. Each gradient is freed at once.

Block by block: all samples go forward once; then, from the last block to the first, each block is computed again and
backward. Memory: the hidden states between blocks, and of one block the activations of a sample and its float32 sums.
For P weights and T tokens: 2PT multiply-adds forward, 2PT to compute blocks again, 4PT backward.

Sample by sample: each goes through all blocks and back. Memory: the activations of one sample and the float32 sums, of
all blocks. 2PT forward, 4PT backward.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import BlockReplay, only_requires_grad
from gblm_compress.calibration.calls import BlockCalls
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import HiddenStates, StatePool, Weights
from gblm_compress.methods.zeros import check_finite
from gblm_compress.progress import Progress
from gblm_compress.settings import GradientNorm

Sums = Iterable[tuple[int, dict[str, Tensor]]]  # Σ_n |g_n|^p of each block's layers, the last block first


def gradient_norms(
    weights: Weights,
    calls: BlockCalls,
    per_block: list[dict[str, nn.Module]],
    norm: GradientNorm,
    pool: StatePool,
    save: Callable[[int, dict[str, Tensor]], None],
    progress: Progress,
    ranks: Ranks,
    skip: frozenset[int] = frozenset(),
    by_sample: bool = False,
) -> None:
    """G = (Σ_n |g_n|^p)^(1/p) of every layer's weight, given to `save` block by block, the last block first.

    g_n is the gradient of the task's loss on sample n (arXiv 2311.04902, section 3), from one backward pass a sample.
    Nothing runs backward below the lowest block that wants gradients.

    Args:
        weights: the dense model; sample by sample, all of it must be in memory.
        per_block: {name: Linear or Conv1D} of each block.
        norm: "l1" (p = 1) or "l2" (p = 2).
        save: takes a block's index and {name: G in float32, in the stored layout of the weight}.
        skip: blocks whose gradients are known already.

    Raises:
        ModelError: a gradient is NaN or infinite; the message names the layer.
    """
    of_blocks = {index: layers for index, layers in enumerate(per_block) if layers and index not in skip}
    if not of_blocks:
        return
    if by_sample:
        sums = _by_sample(weights, calls, of_blocks, norm, progress)
    else:
        sums = _by_block(weights, calls, of_blocks, norm, pool, progress)
    for index, totals in sums:
        ranks.sum_(totals.values())
        for name, total in totals.items():
            check_finite(name, "gradients", total)
            if norm == "l2":
                total.sqrt_()
        save(index, totals)


def _by_block(
    weights: Weights,
    calls: BlockCalls,
    of_blocks: dict[int, dict[str, nn.Module]],
    norm: GradientNorm,
    pool: StatePool,
    progress: Progress,
) -> Sums:
    inputs = _block_inputs(weights, calls, pool, progress)
    upstream = inputs.pop()
    with weights.outer(), only_requires_grad(weights.model, []):
        for sample in progress.track(range(len(calls.samples)), "loss", "samples"):
            upstream[sample] = calls.loss_gradient(sample, upstream[sample])
    lowest = min(of_blocks)
    order = list(reversed(range(lowest, len(weights.blocks))))
    for index in progress.track(order, "gradients", "blocks", tokens=calls.tokens):
        states = inputs.pop()
        with weights.block(index) as block, _measured(block, of_blocks.get(index, {}), norm) as sums:
            for sample, hidden in enumerate(states):
                leaf, output = _run(calls, index, sample, block, hidden, needs_gradient=index > lowest)
                torch.autograd.backward(output, upstream[sample])
                if leaf.grad is not None:
                    upstream[sample] = leaf.grad
        states.release()
        if index in of_blocks:
            yield index, sums
    for states in (*inputs, upstream):
        states.release()


def _by_sample(
    weights: Weights,
    calls: BlockCalls,
    of_blocks: dict[int, dict[str, nn.Module]],
    norm: GradientNorm,
    progress: Progress,
) -> Sums:
    lowest = min(of_blocks)
    with ExitStack() as within:
        blocks = [within.enter_context(weights.block(index)) for index in range(len(weights.blocks))]
        within.enter_context(weights.outer())
        within.enter_context(only_requires_grad(weights.model, []))
        found = {index: within.enter_context(_measured(blocks[index], of_blocks[index], norm)) for index in of_blocks}
        for sample in progress.track(range(len(calls.samples)), "gradients", "samples", tokens=calls.tokens):
            hidden, ran = calls.embed(sample), []
            for index, block in enumerate(blocks):
                leaf, output = _run(calls, index, sample, block, hidden, needs_gradient=index > lowest)
                hidden = output.detach()
                if index >= lowest:
                    ran.append((leaf, output))
            upstream = calls.loss_gradient(sample, hidden)
            while ran:
                leaf, output = ran.pop()
                torch.autograd.backward(output, upstream)
                del output
                if leaf.grad is not None:
                    upstream = leaf.grad
    for index in sorted(found, reverse=True):
        yield index, found.pop(index)


def _run(
    calls: BlockCalls, index: int, sample: int, block: nn.Module, hidden: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """A block's input as a leaf of autograd, and its output with the graph between them."""
    leaf = hidden.detach().requires_grad_(needs_gradient)
    with torch.enable_grad():
        return leaf, calls.calls[index][sample].run(block, leaf)


def _block_inputs(weights: Weights, calls: BlockCalls, pool: StatePool, progress: Progress) -> list[HiddenStates]:
    """The hidden states of all samples before each block, and after the last."""
    replay = BlockReplay(calls, weights, pool, Ranks())
    found = [replay.hidden]
    for index in progress.track(range(len(weights.blocks)), "forward", "blocks", tokens=calls.tokens):
        states = pool.states(len(calls.samples))
        with weights.block(index):
            replay.advance(index, into=states)
        replay.hidden = states
        found.append(states)
    return found


@contextmanager
def _measured(block: nn.Module, layers: dict[str, nn.Module], norm: GradientNorm) -> Iterator[dict[str, Tensor]]:
    """Σ_n |g_n|^p in float32, over the backward passes within the `with`."""
    parameters = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in parameters.items()}

    def reduce_gradient(total: Tensor, weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        weight.grad = None
        if norm == "l1":
            total.add_(gradient.abs_())
        else:
            gradient = gradient.float()
            total.addcmul_(gradient, gradient)

    with only_requires_grad(block, parameters.values()):
        hooks = [
            weight.register_post_accumulate_grad_hook(partial(reduce_gradient, sums[name]))  # type: ignore[no-untyped-call]
            for name, weight in parameters.items()
        ]
        try:
            yield sums
        finally:
            for hook in hooks:
                hook.remove()
