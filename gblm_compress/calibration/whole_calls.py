"""A decoder as one block, where its blocks cannot be run one by one.

Some architectures pass more from block to block than hidden states: keys that later blocks share, what a router has
chosen. Their decoder is then one block, from the embedding to the last norm. All layers are measured in the dense model
at once, so that none sees what the pruning of others does to its input.
"""

from collections.abc import Callable, Sequence
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
    """A model in memory whose decoder is its only block."""

    @classmethod
    def of(cls, weights: Weights, reason: NoChainError) -> Self:
        """
        Args:
            weights: of the model, as they were to be worked on block by block.
            reason: why its blocks are no chain.

        Raises:
            ModelError: the model is on disk, or has no decoder of its own.
        """
        decoder = getattr(weights.model, "base_model", None)
        if not isinstance(weights, ResidentWeights):
            raise ModelError(f"{reason}; such a model is pruned in memory as a whole, give --no-offload") from reason
        if not isinstance(decoder, nn.Module) or decoder is weights.model:
            raise ModelError(f"{reason}, and the model has no decoder beside its head; it cannot be pruned") from reason
        whole = cls(weights.model)
        whole.blocks = [decoder]
        return whole

    def per_block(self, layers: list[dict[str, nn.Module]]) -> list[dict[str, nn.Module]]:
        return [{name: layer for block in layers for name, layer in block.items()}]


@dataclass
class WholeCall(Call):
    """A call of the decoder, whose input is among its arguments."""

    def returned(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        return block(*self.args, **self.kwargs)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        output: Tensor = self.returned(block, hidden)[0]
        return output


class WholeCalls(BlockCalls):
    """As `BlockCalls`, of the decoder as the only block."""

    def __init__(self, weights: WholeWeights, task: Task, samples: Sequence[Sample]) -> None:
        self._weights, self.task, self.samples = weights, task, samples
        self.counted = [task.counted(sample) for sample in samples]
        self.calls = [[self._record(sample) for sample in samples]]
        with torch.no_grad():
            self._like = self.calls[0][0].returned(weights.blocks[0], torch.empty(0))
        self.tokens = counted_tokens(self.counted, self.embed(0))

    def embed(self, sample: int) -> Tensor:
        """Stands for hidden states; nothing reads it."""
        return torch.zeros_like(self._like[0])

    def _record(self, sample: Sample) -> Call:
        found: list[Call] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            found.append(WholeCall(args, kwargs, hidden_is_keyword=False))
            raise _DecoderReached

        with forward_replaced(self._weights.blocks[0], stop), torch.no_grad():
            try:
                run_model(self._weights.model, self.task.arguments(sample))
            except _DecoderReached:
                return found[0]
        raise ModelError(f"{type(self._weights.model).__name__} does not call its decoder; it cannot be pruned")

    def _without_blocks(self, sample: Sample, instead: Callable[[Tensor], Tensor]) -> Any:
        def output(*args: Any, **kwargs: Any) -> Any:
            hidden = instead(self._like[0])
            if isinstance(self._like, tuple):
                return (hidden, *self._like[1:])
            made = copy(self._like)
            made[next(iter(made))] = hidden
            return made

        with forward_replaced(self._weights.blocks[0], output):
            return run_model(self._weights.model, self.task.arguments(sample))


class _DecoderReached(Exception):
    """Ends a forward pass once the arguments of the decoder are known."""


def calls_of(weights: Weights, task: Task, samples: Sequence[Sample]) -> tuple[Weights, BlockCalls]:
    """How a model calls its blocks, and the weights by those blocks: its own, or the decoder as one.

    Raises:
        ModelError: neither can be run.
    """
    try:
        return weights, BlockCalls(weights, task, samples)
    except NoChainError as reason:
        whole = WholeWeights.of(weights, reason)
        return whole, WholeCalls(whole, task, samples)
