"""Calibration: the gradient and activation norms that saliencies read, measured on sample text.

Two passes. `gradient_norms` runs the dense model backwards once per sample and reduces every weight's
gradient as soon as autograd has produced it. `BlockReplay` walks the model block by block, so that each
`Block` sees the output of the blocks before it as they are *after* pruning.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gblm_compress.architecture import check_finite
from gblm_compress.errors import ModelError
from gblm_compress.progress import Progress
from gblm_compress.settings import GradientNorm


def gradient_norms(
    model: nn.Module,
    layers: dict[str, nn.Module],
    samples: Sequence[Tensor],
    norm: GradientNorm,
    progress: Progress,
) -> dict[str, Tensor]:
    """G = (Σ_n |g_n|^p)^(1/p) of every layer's weight, with one backward pass per sample.

    g_n is the gradient of sample n's mean next-token cross-entropy (arXiv 2311.04902, section 3). The
    accumulators are float32; a gradient is reduced into its accumulator and freed while the backward pass
    is still running, so that at most a few layers' gradients exist at a time. Embeddings, norms and heads
    get no gradient at all.

    Args:
        model: a causal language model in eval mode.
        layers: {name: Linear or Conv1D}.
        samples: token ids, each [1, length].
        norm: "l1" (p = 1) or "l2" (p = 2).

    Returns:
        {name: G in float32, in the stored layout of the weight}.

    Raises:
        ModelError: a gradient is NaN or infinite; the message names the layer.
    """
    weights = {name: _weight(layer) for name, layer in layers.items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def reduce_gradient(total: Tensor, weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        weight.grad = None
        if norm == "l1":
            total.add_(gradient.abs_())
        else:
            gradient = gradient.float()
            total.addcmul_(gradient, gradient)

    with only_requires_grad(model, weights.values()):
        hooks = [
            weight.register_post_accumulate_grad_hook(partial(reduce_gradient, sums[name]))  # type: ignore[no-untyped-call]
            for name, weight in weights.items()
        ]
        try:
            for ids in progress.track(samples, "gradients", unit="samples"):
                with torch.enable_grad():
                    logits = model(input_ids=ids, use_cache=False).logits
                    cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
    for name, total in sums.items():
        check_finite(name, "gradients", total)
        if norm == "l2":
            total.sqrt_()
    return sums


class BlockReplay:
    """The hidden states of all samples, on their way through the blocks one block at a time.

    The arguments of every block (masks, position embeddings, …) are recorded from real forward passes of
    the whole model and replayed; they are not rebuilt. Two samples are recorded, so that an architecture
    whose block arguments depend on the text, or whose blocks do not form a chain, is refused instead of
    calibrated wrongly.

    Args:
        model: a causal language model in eval mode.
        blocks: its blocks in order.
        samples: token ids, each [1, length], all of one length.

    Attributes:
        hidden: the hidden states of every sample, on their way, each [1, length, hidden size].

    Raises:
        ModelError: the blocks cannot be replayed.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], samples: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._calls = _record_calls(model, blocks, samples[0])
        if len(samples) > 1:
            _check_same_arguments(self._calls, _record_calls(model, blocks, samples[-1]))
        self.hidden = [_input_of_first_block(model, blocks[0], ids) for ids in samples]

    def block(self, index: int) -> "Block":
        """Block `index` with the hidden states that go into it now."""
        return Block(self._blocks[index], self._calls[index], self.hidden)

    def advance(self, index: int) -> None:
        """Replace the hidden states by the output of block `index`."""
        block = self.block(index)
        for position, hidden in enumerate(self.hidden):
            self.hidden[position] = block.run(hidden)


@dataclass(frozen=True)
class Block:
    """One block of the model and what goes into it.

    Attributes:
        module: the block; what it computes follows its weights as they are now.
        call: its arguments beside the hidden states.
        inputs: the hidden states of every sample, each [1, length, hidden size].
    """

    module: nn.Module
    call: "_Call"
    inputs: Sequence[Tensor]

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Tensor:
        """The block's output [1, length, hidden size] for one sample's hidden states of that shape."""
        return self.call.run(self.module, hidden)


def activation_norms(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A_j = sqrt(mean over samples of the sum over tokens of x_j²) of the linear layers in a block.

    Returns:
        {name: A [in_features], float32}.

    Raises:
        ModelError: an activation is NaN or infinite; the message names the layer.
    """
    sums: dict[str, Tensor] = {}

    def accumulate(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].detach().float().square().reshape(-1, args[0].shape[-1]).sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    with _hooks(layer.register_forward_pre_hook(partial(accumulate, name)) for name, layer in layers.items()):
        for hidden in block.inputs:
            block.run(hidden)
    if missing := sorted(set(layers) - set(sums)):
        raise ModelError(f"{missing[0]}: the layer never ran on the calibration text; add it to 'ignore'")
    for name, total in sums.items():
        check_finite(name, "activations", total)
    return {name: (total / len(block.inputs)).sqrt_() for name, total in sums.items()}


@dataclass
class _Call:
    """One block's recorded arguments, less the hidden states: positional ones after them, and keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_is_keyword: bool

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        if self.hidden_is_keyword:
            return _hidden_output(block(*self.args, hidden_states=hidden, **self.kwargs))
        return _hidden_output(block(hidden, *self.args, **self.kwargs))


class _FirstBlockReached(Exception):
    """Ends a forward pass once the input of the first block is known."""


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(args[1:], dict(kwargs), hidden_is_keyword=False)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], _Call((), rest, hidden_is_keyword=True)


def _hidden_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _record_calls(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> list[_Call]:
    """Run the whole model and record how it calls each block, checking that the blocks form a chain."""
    calls: list[_Call] = []
    outputs: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        if outputs and not torch.allclose(hidden, outputs[-1], rtol=0, atol=0, equal_nan=True):
            raise ModelError(
                f"{type(model).__name__}: block {len(calls)} does not take the output of the block before it as its "
                "input; architectures whose blocks do not form a chain are not supported"
            )
        calls.append(call)

    def after(block: nn.Module, args: Any, output: Any) -> None:
        outputs[:] = [_hidden_output(output)]

    with _hooks(
        hook
        for block in blocks
        for hook in (
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after),
        )
    ):
        model(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks):
        raise ModelError(
            f"{type(model).__name__}: a forward pass ran {len(calls)} blocks of {len(blocks)}; architectures that skip "
            "or repeat blocks are not supported"
        )
    return calls


@torch.no_grad()
def _input_of_first_block(model: nn.Module, block: nn.Module, ids: Tensor) -> Tensor:
    reached: list[Tensor] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(_split_call(args, kwargs)[0])
        raise _FirstBlockReached

    with _hooks([block.register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            model(input_ids=ids, use_cache=False)
        except _FirstBlockReached:
            return reached[0]
    raise AssertionError("the first block ran when the calls were recorded")


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


def _weight(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight
