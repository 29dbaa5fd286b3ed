"""Blocks with their inputs, which come from the *pruned* blocks before them, and the statistics of their layers."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from gblm_compress.calibration.calls import BlockCalls, Call, ForwardEnded, counted_tokens
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import HiddenStates, StatePool, Weights
from gblm_compress.errors import ModelError
from gblm_compress.methods.choices import Need, Statistics
from gblm_compress.methods.zeros import check_finite
from gblm_compress.models.architecture import as_matrix, weight_matrix
from gblm_compress.settings import GradientNorm


class BlockReplay:
    """The hidden states [1, length, hidden size] of all samples, taken through one block after the other."""

    def __init__(self, calls: BlockCalls, weights: Weights, pool: StatePool, ranks: Ranks) -> None:
        self._calls, self._weights, self._ranks = calls, weights, ranks
        self.hidden = HiddenStates(pool, len(calls.samples))
        with weights.outer():
            for sample in range(len(calls.samples)):
                self.hidden[sample] = calls.embed(sample)

    def block(self, index: int) -> "Block":
        """Block `index` with its present inputs; needs `weights.block(index)`."""
        calls = self._calls
        return Block(self._weights.blocks[index], calls.calls[index], self.hidden, calls.counted, self._ranks)

    def advance(self, index: int, into: HiddenStates | None = None) -> None:
        """Replace the hidden states by the output of block `index`, or write it `into` others."""
        block, target = self.block(index), self.hidden if into is None else into
        for sample in range(len(self.hidden)):
            target[sample] = block.run(sample)


@dataclass(frozen=True)
class Block:
    module: nn.Module
    calls: Sequence[Call]  # of every sample of this process
    inputs: Sequence[Tensor]  # hidden states [1, tokens, hidden size] of every sample
    counted: Sequence[Tensor | None]  # bool [1, tokens] for every sample, False for padding; None if all are counted
    ranks: Ranks = field(default_factory=Ranks)

    @torch.no_grad()
    def run(self, sample: int) -> Tensor:
        """The block's output [1, tokens, hidden size] for one sample."""
        return self.calls[sample].run(self.module, self.inputs[sample])

    def without_padding(self, sample: int, states: Tensor) -> Tensor:
        """The counted tokens in `states` [1, tokens, …] of a sample."""
        counted = self.counted[sample]
        return states if counted is None else states[counted]

    @property
    def samples(self) -> int:
        """Over all processes."""
        return self.ranks.total(len(self.inputs))

    @property
    def tokens(self) -> float:
        """Counted tokens of a sample, on average over all processes."""
        return self.ranks.total(counted_tokens(self.counted, self.inputs[0])) / self.samples


@torch.no_grad()
def _sum_over_inputs(
    block: Block, layers: dict[str, nn.Module], add: Callable[[Tensor | None, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """{name: a sum over the inputs of a layer} and {name: tokens that it got}, over all processes.

    `add` takes the sum so far and an input [tokens, in_features] in float32 without padding. Layers that get the very
    same input one after the other (queries, keys and values) share a sum. A weight is measured wherever it is used.
    """
    sums: dict[str, Tensor] = {}
    got: Counter[str] = Counter()  # tokens
    ran: Counter[str] = Counter()  # in the sample at work
    latest: tuple[Tensor, Tensor | None, Tensor, set[str]] | None = None  # input, sum before and after, layers
    counted: Tensor | None = None  # of the sample at work
    whole = True  # the first sample goes through the whole block: a layer may be called again

    def measure(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal latest
        ran[name] += 1
        got[name] += args[0].numel() // args[0].shape[-1] if counted is None else int(counted.sum())
        before = sums.get(name)
        if latest and args[0] is latest[0] and before is latest[1] and name not in latest[3]:
            sums[name] = latest[2]
            latest[3].add(name)
        else:
            shared = before is not None and sum(total is before for total in sums.values()) > 1
            own = before.clone() if before is not None and shared else before
            sums[name] = add(own, _counted_tokens(name, args[0].detach(), counted))
            latest = (args[0], before, sums[name], {name})
        if not whole and len(ran) == len(layers):
            raise ForwardEnded

    names = {id(layer.weight): name for name, layer in layers.items()}
    with ExitStack() as hooks:
        for user in block.module.modules():
            if name := names.get(id(user._parameters.get("weight"))):
                hooks.enter_context(user.register_forward_pre_hook(partial(measure, name)))
        for sample, counted in enumerate(block.counted):  # noqa: B007 - `measure` reads `counted`
            ran.clear()
            with suppress(ForwardEnded):
                block.run(sample)
            whole = whole and (len(ran) < len(layers) or ran.total() > len(layers))
    device = block.inputs[0].device
    missing = [name for name in layers if name not in sums]
    if block.ranks.total(len(missing)):  # then processes may differ in which layers share a sum
        users = Counter(map(id, sums.values()))
        for name, total in list(sums.items()):
            if users[id(total)] > 1:  # only these: copies of all Gram matrices of a mixture would take gigabytes
                sums[name] = total.clone()
        for name in missing:
            sums[name] = add(None, torch.zeros(0, weight_matrix(layers[name]).shape[1], device=device))
    block.ranks.sum_({id(sums[name]): sums[name] for name in layers}.values())
    tokens = torch.tensor([got[name] for name in layers], device=device)
    block.ranks.sum_([tokens])
    for name, total in sums.items():
        check_finite(name, "activations", total)
    return sums, dict(zip(layers, tokens.tolist(), strict=True))


def _counted_tokens(name: str, inputs: Tensor, counted: Tensor | None) -> Tensor:
    """A layer's input as [tokens, in_features] in float32, without padding."""
    tokens = inputs.reshape(-1, inputs.shape[-1]).float()
    if counted is not None and len(tokens) != counted.numel():
        raise ModelError(
            f"{name}: the layer reads {len(tokens)} rows of a sample of {counted.numel()} tokens, so padding "
            "cannot be told from text; give samples without padding, or add the layer to 'ignore'"
        )
    return tokens if counted is None else tokens[counted.flatten()]


def layer_statistics(
    block: Block | None, layers: dict[str, nn.Module], gradients: dict[str, Tensor], needs: Need
) -> dict[str, Statistics]:
    """The statistics of each layer; `gradients` are in the stored layout of its weight, if they were measured."""
    grams: dict[str, Tensor] = {}
    activations: dict[str, Tensor] = {}
    regional: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    if block is not None and layers:
        if Need.GRAM in needs:
            grams, tokens = _sum_over_inputs(block, layers, _add_products)
            activations = {name: (gram.diagonal() / block.samples).sqrt() for name, gram in grams.items()}
        elif Need.ACTIVATIONS in needs:
            squares, tokens = _sum_over_inputs(block, layers, _add_squares)
            activations = {name: (total / block.samples).sqrt_() for name, total in squares.items()}
        if Need.REGIONAL in needs:
            regional = _regional_norms(block, layers)

    def matrix(layer: nn.Module, stored: Tensor | None) -> Tensor | None:
        return None if stored is None else as_matrix(layer, stored)

    return {
        name: Statistics(
            activation_norm=activations.get(name),
            gradient_norm=matrix(layer, gradients.get(name)),
            regional_norm=matrix(layer, regional.get(name)),
            gram=grams.get(name),
            tokens=tokens.get(name),
        )
        for name, layer in layers.items()
    }


def _add_squares(total: Tensor | None, x: Tensor) -> Tensor:
    squares = x.square().sum(0)
    return squares if total is None else total + squares


def _add_products(total: Tensor | None, x: Tensor) -> Tensor:
    return x.T @ x if total is None else total.addmm_(x.T, x)


def _regional_norms(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """{name: R in float32, in the stored layout of the weight}."""
    with gradient_sums(block.module, layers, "l2") as sums, torch.enable_grad():
        for sample, hidden in enumerate(block.inputs):
            output = block.calls[sample].run(block.module, hidden)
            block.without_padding(sample, output).float().norm().backward()
    block.ranks.sum_(sums.values())
    for name, total in sums.items():
        check_finite(name, "gradients", total)
        total.div_(block.samples).sqrt_()
    return sums


@contextmanager
def gradient_sums(block: nn.Module, layers: dict[str, nn.Module], norm: GradientNorm) -> Iterator[dict[str, Tensor]]:
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

    with only_requires_grad(block, parameters.values()), ExitStack() as hooks:
        for name, weight in parameters.items():
            reduce = partial(reduce_gradient, sums[name])
            hooks.enter_context(weight.register_post_accumulate_grad_hook(reduce))  # type: ignore[no-untyped-call]
        yield sums


@contextmanager
def only_requires_grad(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Within the `with`, autograd sees `weights` and nothing else of the model."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
