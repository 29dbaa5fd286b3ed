"""All blocks as one, where they cannot be run one by one.

Some architectures pass more from block to block than hidden states: keys that later blocks share, what a router has
chosen. In others the states change their size, as between the stages of Swin. Others run blocks several times, as
ALBERT does, or have blocks that share weights, as Zamba does. Then what is around the blocks, a decoder or an encoder,
is one block. All layers are measured in the dense model at once, wherever their weights are used, so that none sees
what the pruning of others does to its input.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gblm_compress.calibration.block_calls import (
    BlockCalls,
    Call,
    NoChainError,
    counted_tokens,
    forward_replaced,
    run_model,
)
from gblm_compress.calibration.block_weights import ResidentWeights, Weights
from gblm_compress.errors import ModelError
from gblm_compress.tasks.task import Sample, Task


class WholeWeights(ResidentWeights):
    """A model in memory whose only block is what is around its blocks."""

    @classmethod
    def of(cls, weights: Weights, arguments: dict[str, Any], reason: NoChainError) -> Self:
        """
        Args:
            weights: of the model, as they were to be worked on block by block.
            arguments: of the model's forward pass.
            reason: why its blocks are no chain.

        Raises:
            ModelError: the model is on disk, or nothing but itself is around its blocks.
        """
        if not isinstance(weights, ResidentWeights):
            raise ModelError(f"{reason}; such a model is pruned in memory as a whole, give more --memory") from reason
        around = _around_blocks(weights, arguments)
        if around is None:
            raise ModelError(f"{reason}, and the model has no decoder beside its head; it cannot be pruned") from reason
        whole = cls(weights.model)
        whole.blocks = [around]
        return whole

    def per_block(self, layers: list[dict[str, nn.Module]]) -> list[dict[str, nn.Module]]:
        return [{name: layer for block in layers for name, layer in block.items()}]


@dataclass
class WholeCall(Call):
    """A call of what is around the blocks, whose input is among its arguments."""

    def returned(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        return block(*self.args, **self.kwargs)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        return _states(self.returned(block, hidden))


class WholeCalls(BlockCalls):
    """As `BlockCalls`, of what is around the blocks as the only one."""

    def __init__(self, weights: WholeWeights, task: Task, samples: Sequence[Sample]) -> None:
        self._weights, self.task, self.samples = weights, task, samples
        self.counted = [task.counted(sample) for sample in samples]
        self.calls = [[self._record(sample) for sample in samples]]
        with torch.no_grad():
            self._like = self.calls[0][0].returned(weights.blocks[0], torch.empty(0))
        self.tokens = counted_tokens(self.counted, self.embed(0))

    def embed(self, sample: int) -> Tensor:
        """Stands for hidden states; nothing reads it."""
        return torch.zeros_like(_states(self._like))

    def _record(self, sample: Sample) -> Call:
        found: list[Call] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            found.append(WholeCall(args, kwargs, hidden_is_keyword=False))
            raise _AroundBlocksReached

        with forward_replaced(self._weights.blocks[0], stop), torch.no_grad():
            try:
                run_model(self._weights.model, self.task.arguments(sample))
            except _AroundBlocksReached:
                return found[0]
        raise AssertionError("it ran when it was looked for")

    def _without_blocks(self, sample: Sample, instead: Callable[[Tensor], Tensor]) -> Any:
        def output(*args: Any, **kwargs: Any) -> Any:
            hidden = instead(_states(self._like))
            if isinstance(self._like, Tensor):
                return hidden
            if isinstance(self._like, tuple):
                return (hidden, *self._like[1:])
            made = copy(self._like)
            made[next(iter(made))] = hidden
            return made

        with forward_replaced(self._weights.blocks[0], output):
            return run_model(self._weights.model, self.task.arguments(sample))


def _states(output: Any) -> Tensor:
    """The hidden states of what a module gives."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


@torch.no_grad()
def _around_blocks(weights: Weights, arguments: dict[str, Any]) -> nn.Module | None:
    """The innermost module around the blocks that a forward pass runs once; None if that is the model itself."""
    runs: Counter[nn.Module] = Counter()
    around, path = [], weights.prefix
    with ExitStack() as within:
        while path := path.rpartition(".")[0]:
            around.append(weights.model.get_submodule(path))
            within.callback(around[-1].register_forward_pre_hook(lambda module, _: runs.update([module])).remove)
        run_model(weights.model, arguments)
    return next((module for module in around if runs[module] == 1), None)


class _AroundBlocksReached(Exception):
    """Ends a forward pass once the arguments of what is around the blocks are known."""


def calls_of(weights: Weights, task: Task, samples: Sequence[Sample]) -> tuple[Weights, BlockCalls]:
    """How a model calls its blocks, and the weights by those blocks: its own, or all of them as one.

    Raises:
        ModelError: neither can be run.
    """
    try:
        return weights, BlockCalls(weights, task, samples)
    except NoChainError as reason:
        whole = WholeWeights.of(weights, task.arguments(samples[0]), reason)
        return whole, WholeCalls(whole, task, samples)
