"""Gradient norms of the dense model, block by block: forward once, then backward with each block computed again.

The whole model's activations, gradients and accumulators never exist together: at any time there are the hidden states
between blocks, and of one block its activations for one sample, its gradients and its float32 accumulators.

In multiplications and additions, for P weights in the blocks and T tokens: 2PT forward, 2PT to compute blocks again,
4PT backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gblm_compress.architecture import check_finite
from gblm_compress.block_weights import Weights
from gblm_compress.calibration import BlockCalls, BlockReplay, only_requires_grad
from gblm_compress.hidden_states import HiddenStates, StatePool
from gblm_compress.progress import Progress
from gblm_compress.ranks import Ranks
from gblm_compress.settings import GradientNorm


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
) -> None:
    """G = (Σ_n |g_n|^p)^(1/p) of every layer's weight, given to `save` block by block, the last block first.

    g_n is the gradient of sample n's mean next-token cross-entropy (arXiv 2311.04902, section 3), from one backward
    pass a sample. Embeddings, norms and heads get no gradient; below the lowest block that wants one nothing runs.

    Args:
        weights: the dense model.
        calls: how its blocks are called, and the samples.
        per_block: {name: Linear or Conv1D} of each block.
        norm: "l1" (p = 1) or "l2" (p = 2).
        pool: where hidden states are kept.
        save: takes a block's index and {name: G in float32, in the stored layout of the weight}.
        skip: blocks whose gradients are known already.

    Raises:
        ModelError: a gradient is NaN or infinite; the message names the layer.
    """
    wanted = [index for index, layers in enumerate(per_block) if layers and index not in skip]
    if not wanted:
        return
    inputs = _block_inputs(weights, calls, pool, progress, ranks)
    upstream = inputs.pop()
    _loss_gradients_(weights, calls, upstream, progress)
    order = list(reversed(range(min(wanted), len(per_block))))
    for index in progress.track(order, "gradients", "blocks", tokens=_tokens(calls)):
        states = inputs.pop()
        layers = per_block[index] if index in wanted else {}
        with weights.block(index) as block, _accumulated(block, layers, norm) as sums:
            for sample, hidden in enumerate(states):
                leaf = hidden.detach().requires_grad_(index > min(wanted))
                with torch.enable_grad():
                    output = calls.calls[index].run(block, leaf)
                torch.autograd.backward(output, upstream[sample])
                if leaf.grad is not None:
                    upstream[sample] = leaf.grad
        states.release()
        if index in wanted:
            ranks.sum_(sums.values())
            for name, total in sums.items():
                check_finite(name, "gradients", total)
                if norm == "l2":
                    total.sqrt_()
            save(index, sums)
    for states in (*inputs, upstream):
        states.release()


def _block_inputs(
    weights: Weights, calls: BlockCalls, pool: StatePool, progress: Progress, ranks: Ranks
) -> list[HiddenStates]:
    """The hidden states of all samples before each block, and after the last."""
    replay = BlockReplay(calls, weights, pool, ranks)
    found = [replay.hidden]
    for index in progress.track(range(len(weights.blocks)), "forward", "blocks", tokens=_tokens(calls)):
        states = pool.states(len(calls.samples))
        with weights.block(index):
            replay.advance(index, into=states)
        replay.hidden = states
        found.append(states)
    return found


def _loss_gradients_(weights: Weights, calls: BlockCalls, states: HiddenStates, progress: Progress) -> None:
    """Replace the last block's output of each sample by the gradient of the sample's mean cross-entropy to it."""
    with weights.outer(), only_requires_grad(weights.model, []):
        for sample, ids in enumerate(progress.track(calls.samples, "loss", "samples")):
            leaf = states[sample].detach().requires_grad_()
            with torch.enable_grad():
                logits = calls.logits(ids, leaf)
                cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()  # type: ignore[no-untyped-call]
            del logits
            assert leaf.grad is not None
            states[sample] = leaf.grad


@contextmanager
def _accumulated(block: nn.Module, layers: dict[str, nn.Module], norm: GradientNorm) -> Iterator[dict[str, Tensor]]:
    """Sums of |g|^p in float32 over the backward passes within the `with`.

    A gradient is added and freed as soon as autograd has produced it.
    """
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


def _tokens(calls: BlockCalls) -> int:
    return sum(ids.numel() for ids in calls.samples)
