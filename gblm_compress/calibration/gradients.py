"""Gradient norms of the dense model's weights, in one of two orders with the same bits. Each gradient is freed at once.

Block by block keeps all hidden states, and float32 sums and activations of a sample for one block. Sample by sample
keeps them for all blocks, and takes three quarters of the operations: no block is computed twice.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import BlockReplay, gradient_sums, only_requires_grad
from gblm_compress.calibration.calls import BlockCalls, Call
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import HiddenStates, StatePool, Weights
from gblm_compress.methods.zeros import check_finite
from gblm_compress.progress import Progress
from gblm_compress.settings import GradientNorm

OfBlock = tuple[int, dict[str, Tensor]]


@dataclass(frozen=True)
class GradientPass:
    """Measures gradients of the dense model; sample by sample, the whole model must be in memory."""

    weights: Weights
    calls: BlockCalls
    pool: StatePool
    ranks: Ranks
    progress: Progress

    def norms(
        self, of_blocks: dict[int, dict[str, nn.Module]], norm: GradientNorm, by_sample: bool = False
    ) -> Iterator[OfBlock]:
        """(block, {name: G in float32, in the stored layout of the weight}) of {block: its layers}, the last first.

        G = (Σ_n |g_n|^p)^(1/p), where g_n is the gradient of the task's loss on sample n (arXiv 2311.04902, section 3)
        and p is 1 for "l1", 2 for "l2". `ModelError` if a gradient is NaN or infinite.
        """
        if not of_blocks:
            return
        for index, totals in (self._by_sample if by_sample else self._by_block)(of_blocks, norm):
            self.ranks.sum_(totals.values())
            for name, total in totals.items():
                check_finite(name, "gradients", total)
                if norm == "l2":
                    total.sqrt_()
            yield index, totals

    def _by_block(self, of_blocks: dict[int, dict[str, nn.Module]], norm: GradientNorm) -> Iterator[OfBlock]:
        weights, calls = self.weights, self.calls
        inputs = self._block_inputs()
        upstream = inputs.pop()
        with weights.outer(), only_requires_grad(weights.model, []):
            for sample in self.progress.track(range(len(calls.samples)), "loss", "samples"):
                upstream[sample] = calls.loss_gradient(sample, upstream[sample])
        lowest = min(of_blocks)
        order = list(reversed(range(lowest, len(weights.blocks))))
        for index in self.progress.track(order, "gradients", "blocks", tokens=calls.tokens):
            states = inputs.pop()
            with weights.block(index) as block, gradient_sums(block, of_blocks.get(index, {}), norm) as sums:
                for sample, hidden in enumerate(states):
                    leaf, output = _run(calls.calls[index][sample], block, hidden, needs_gradient=index > lowest)
                    torch.autograd.backward(output, upstream[sample])
                    if leaf.grad is not None:
                        upstream[sample] = leaf.grad
            states.release()
            if index in of_blocks:
                yield index, sums
        for states in (*inputs, upstream):
            states.release()

    def _by_sample(self, of_blocks: dict[int, dict[str, nn.Module]], norm: GradientNorm) -> Iterator[OfBlock]:
        weights, calls, lowest = self.weights, self.calls, min(of_blocks)
        with ExitStack() as within:
            blocks = [within.enter_context(weights.block(index)) for index in range(len(weights.blocks))]
            within.enter_context(weights.outer())
            within.enter_context(only_requires_grad(weights.model, []))
            found = {i: within.enter_context(gradient_sums(blocks[i], of_blocks[i], norm)) for i in of_blocks}
            samples = range(len(calls.samples))
            for sample in self.progress.track(samples, "gradients", "samples", tokens=calls.tokens):
                hidden, ran = calls.embed(sample), []
                for index, block in enumerate(blocks):
                    leaf, output = _run(calls.calls[index][sample], block, hidden, needs_gradient=index > lowest)
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

    def _block_inputs(self) -> list[HiddenStates]:
        """The hidden states of all samples before each block, and after the last."""
        calls = self.calls
        replay = BlockReplay(calls, self.weights, self.pool, Ranks())
        found = [replay.hidden]
        for index in self.progress.track(range(len(self.weights.blocks)), "forward", "blocks", tokens=calls.tokens):
            states = HiddenStates(self.pool, len(calls.samples))
            with self.weights.block(index):
                replay.advance(index, into=states)
            replay.hidden = states
            found.append(states)
        return found


def _run(call: Call, block: nn.Module, hidden: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """A block's input as a leaf of autograd, and its output with the graph between them."""
    leaf = hidden.detach().requires_grad_(needs_gradient)
    with torch.enable_grad():
        return leaf, call.run(block, leaf)
