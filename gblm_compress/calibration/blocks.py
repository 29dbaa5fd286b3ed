"""Calibration: how the blocks of a model are called on sample text, and the activation norms inside them.

`BlockCalls` learns how a model calls its blocks; `BlockReplay` takes the samples through them one block at a time, so
that each `Block` sees the output of the blocks before it as they are *after* pruning. The gradients are in
`gradients.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress.calibration.block_weights import Weights
from gblm_compress.calibration.hidden_states import HiddenStates, StatePool
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import ModelError
from gblm_compress.methods.zeros import check_finite


class BlockCalls:
    """How a model calls its blocks, and what it does before and after them.

    The arguments of every block (masks, position embeddings, …) are recorded from forward passes of the model, in
    which only the first block computes, and replayed; they are not rebuilt. Two samples are recorded, so that an
    architecture whose block arguments depend on the text, or whose blocks do not form a chain, is refused instead of
    calibrated wrongly.

    Args:
        weights: a causal language model in eval mode.
        samples: token ids, each [1, length], all of one length.

    Raises:
        ModelError: the blocks cannot be replayed.
    """

    def __init__(self, weights: Weights, samples: Sequence[Tensor]) -> None:
        self._weights = weights
        self.samples = samples
        self.calls = _record_calls(weights, samples[0])
        if len(samples) > 1:
            _check_same_arguments(self.calls, _record_calls(weights, samples[-1]))

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What goes into the first block [1, length, hidden size]; needs `weights.outer()`."""

        def stop(hidden: Tensor) -> Tensor:
            raise _FirstBlockReached(hidden)

        try:
            self._without_blocks(ids, stop)
        except _FirstBlockReached as reached:
            return reached.hidden
        raise AssertionError("the first block ran when the calls were recorded")

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits [1, length, vocabulary] for what the last block gives; needs `weights.outer()`.

        Args:
            hidden: [1, length, hidden size]; gradients flow to it.
        """
        return self._without_blocks(ids, lambda first: hidden).logits

    def _without_blocks(self, ids: Tensor, instead: Callable[[Tensor], Tensor]) -> Any:
        """A forward pass of the model in which `instead` stands for all its blocks."""
        model, path = self._weights.model, self._weights.prefix
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        stand_in = _StandIn(self._weights.blocks[0], instead, self.calls[0].beside)
        blocks = getattr(holder, name)
        setattr(holder, name, nn.ModuleList([stand_in]))
        try:
            return model(input_ids=ids, use_cache=False)
        finally:
            setattr(holder, name, blocks)


class BlockReplay:
    """The hidden states of all samples, on their way through the blocks one block at a time.

    Args:
        calls: how the blocks are called.
        pool: where the states are kept.
        ranks: the processes that share the samples.

    Attributes:
        hidden: the hidden states of every sample, on their way, each [1, length, hidden size].
    """

    def __init__(self, calls: BlockCalls, weights: Weights, pool: StatePool, ranks: Ranks) -> None:
        self._calls, self._weights, self._ranks = calls, weights, ranks
        self.hidden = pool.states(len(calls.samples))
        with weights.outer():
            for index, ids in enumerate(calls.samples):
                self.hidden[index] = calls.embed(ids)

    def block(self, index: int) -> "Block":
        """Block `index` with the hidden states that go into it now; needs `weights.block(index)`."""
        return Block(self._weights.blocks[index], self._calls.calls[index], self.hidden, self._ranks)

    def advance(self, index: int, into: HiddenStates | None = None) -> None:
        """Replace the hidden states by the output of block `index`, or write that `into` others."""
        block = self.block(index)
        target = self.hidden if into is None else into
        for position, hidden in enumerate(self.hidden):
            target[position] = block.run(hidden)


@dataclass(frozen=True)
class Block:
    """One block of the model and what goes into it.

    Attributes:
        module: the block; what it computes follows its weights as they are now.
        call: its arguments beside the hidden states.
        inputs: the hidden states of every sample of this process, each [1, length, hidden size].
        ranks: the processes that share the samples.
    """

    module: nn.Module
    call: "_Call"
    inputs: Sequence[Tensor]
    ranks: Ranks = field(default_factory=Ranks)

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Tensor:
        """The block's output [1, length, hidden size] for one sample's hidden states of that shape."""
        return self.call.run(self.module, hidden)

    @property
    def samples(self) -> int:
        """How many samples there are over all processes."""
        return self.ranks.total(len(self.inputs), self.inputs[0].device)


def activation_norms(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A_j = sqrt(mean over samples of the sum over tokens of x_j²) of the linear layers in a block.

    Returns:
        {name: A [in_features], float32}.

    Raises:
        ModelError: an activation is NaN or infinite, or a layer never ran; the message names the layer.
    """

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        squares = x.square().sum(0)
        return squares if total is None else total + squares

    sums = sum_over_inputs(block, layers, add)
    return {name: (total / block.samples).sqrt_() for name, total in sums.items()}


@torch.no_grad()
def sum_over_inputs(
    block: Block, layers: dict[str, nn.Module], add: Callable[[Tensor | None, Tensor], Tensor]
) -> dict[str, Tensor]:
    """A sum over all samples of something that is measured on the input of every layer.

    Layers that are called one after the other with the very same input (queries, keys and values, say) share one sum.
    Once all layers of a block have run, the rest of the block is left out.

    Args:
        add: takes the sum so far (None at first; it may be changed) and a layer's input [tokens, in_features] in
            float32; gives the new sum.

    Returns:
        {name: sum over the samples of all processes}.

    Raises:
        ModelError: a sum is NaN or infinite, or a layer never ran; the message names the layer.
    """
    sums: dict[str, Tensor] = {}
    ran: Counter[str] = Counter()  # in the sample at work
    latest: tuple[Tensor, Tensor | None, Tensor, set[str]] | None = None  # an input, a sum before and after it, whose
    whole = True  # the first sample goes through the whole block: who knows whether a layer is called again

    def measure(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal latest
        ran[name] += 1
        before = sums.get(name)
        if latest and args[0] is latest[0] and before is latest[1] and name not in latest[3]:
            sums[name] = latest[2]
            latest[3].add(name)
        else:
            shared = before is not None and sum(total is before for total in sums.values()) > 1
            own = before.clone() if before is not None and shared else before
            sums[name] = add(own, args[0].detach().reshape(-1, args[0].shape[-1]).float())
            latest = (args[0], before, sums[name], {name})
        if not whole and len(ran) == len(layers):
            raise _AllLayersReached

    with _hooks(layer.register_forward_pre_hook(partial(measure, name)) for name, layer in layers.items()):
        for hidden in block.inputs:
            ran.clear()
            with suppress(_AllLayersReached):
                block.run(hidden)
            whole = whole and (len(ran) < len(layers) or ran.total() > len(layers))
    if missing := sorted(set(layers) - set(sums)):
        raise ModelError(f"{missing[0]}: the layer never ran on the calibration text; add it to 'ignore'")
    block.ranks.sum_({id(sums[name]): sums[name] for name in layers}.values())
    for name, total in sums.items():
        check_finite(name, "activations", total)
    return sums


@dataclass
class _Call:
    """One block's recorded arguments, less the hidden states: positional ones after them, and keywords.

    Attributes:
        beside: what a block returns after the hidden states; None if it returns nothing but those, and no tuple.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_is_keyword: bool
    beside: tuple[Any, ...] | None = None

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        if self.hidden_is_keyword:
            return _hidden_output(block(*self.args, hidden_states=hidden, **self.kwargs))
        return _hidden_output(block(hidden, *self.args, **self.kwargs))


class _FirstBlockReached(Exception):
    """Ends a forward pass once the input of the first block is known."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _LastBlockReached(Exception):
    """Ends a forward pass once the last block was called."""


class _AllLayersReached(Exception):
    """Ends a block's forward pass once all its layers were called."""


class _StandIn(nn.Module):
    """Takes the place of all blocks; what a model asks of a block beside calling it, the first block answers."""

    def __init__(self, block: nn.Module, instead: Callable[[Tensor], Tensor], beside: tuple[Any, ...] | None) -> None:
        super().__init__()
        self._block, self._instead, self._beside = [block], instead, beside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._instead(_split_call(args, kwargs)[0])
        return output if self._beside is None else (output, *self._beside)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(args[1:], dict(kwargs), hidden_is_keyword=False)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], _Call((), rest, hidden_is_keyword=True)


def _hidden_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _record_calls(weights: Weights, ids: Tensor) -> list[_Call]:
    """How the model calls each of its blocks, checking that they form a chain.

    Only the first block computes, to show what a block returns. The others give the negative of what they get: enough
    to see whether the next one takes it.
    """
    model, blocks = weights.model, weights.blocks
    calls: list[_Call] = []
    latest: list[Tensor] = []
    with ExitStack() as within, suppress(_LastBlockReached), weights.outer(), weights.block(0) as first:
        compute = first.forward

        def record(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_call(args, kwargs)
            if latest and not torch.allclose(hidden, latest[0], rtol=0, atol=0, equal_nan=True):
                raise ModelError(
                    f"{type(model).__name__}: block {len(calls)} does not take the output of the block before it as "
                    "its input; architectures whose blocks do not form a chain are not supported"
                )
            if any(isinstance(value, MutableMapping) and not value for value in (*call.args, *call.kwargs.values())):
                raise ModelError(
                    f"{type(model).__name__}: block {len(calls)} gets an empty mapping, through which blocks pass "
                    "something on beside the hidden states; such architectures are not supported"
                )
            if calls:
                output, call.beside = -hidden, calls[0].beside
            else:
                returned = compute(*args, **kwargs)
                output, call.beside = _hidden_output(returned), returned[1:] if isinstance(returned, tuple) else None
            latest[:] = [output]
            calls.append(call)
            if block is blocks[-1]:
                raise _LastBlockReached
            return output if call.beside is None else (output, *call.beside)

        for block in blocks:
            within.enter_context(_forward(block, partial(record, block)))
        model(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks):
        raise ModelError(
            f"{type(model).__name__}: a forward pass ran {len(calls)} blocks of {len(blocks)}; architectures that skip "
            "or repeat blocks are not supported"
        )
    return calls


def _check_same_arguments(first: list[_Call], second: list[_Call]) -> None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        pairs = [
            *((str(i), a, b) for i, (a, b) in enumerate(zip(one.args, other.args, strict=True))),
            *((name, one.kwargs[name], other.kwargs.get(name)) for name in one.kwargs),
        ]
        for name, a, b in pairs:
            if not _same(a, b):
                raise ModelError(
                    f"block {index}: its argument {name!r} depends on the text; such architectures are not supported"
                )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)


@contextmanager
def _forward(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for the duration of a `with`; its hooks stay."""
    of_class = "forward" not in vars(module)
    before = module.forward
    module.forward = instead
    try:
        yield
    finally:
        if of_class:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    """Keep the hooks for the duration of a `with`, and remove them even when a forward pass raises."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only_requires_grad(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let autograd see `weights` and nothing else of the model for the duration of a `with`."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
