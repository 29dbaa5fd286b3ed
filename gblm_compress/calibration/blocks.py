"""Blocks with their inputs, and the statistics of their layers.

`BlockReplay` runs the samples through one block after the other, so that each `Block` sees the output of the *pruned*
blocks before it.
"""

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
from gblm_compress.methods.fits import activation_norms_of
from gblm_compress.methods.zeros import check_finite
from gblm_compress.models.architecture import as_matrix, weight_matrix


class BlockReplay:
    """The hidden states [1, length, hidden size] of all samples, taken through one block after the other."""

    def __init__(self, calls: BlockCalls, weights: Weights, pool: StatePool, ranks: Ranks) -> None:
        self._calls, self._weights, self._ranks = calls, weights, ranks
        self.hidden = pool.states(len(calls.samples))
        with weights.outer():
            for sample in range(len(calls.samples)):
                self.hidden[sample] = calls.embed(sample)

    def block(self, index: int) -> "Block":
        """Block `index` with its present inputs; needs `weights.block(index)`."""
        calls, counted = self._calls.calls[index], self._calls.counted
        return Block(self._weights.blocks[index], calls, self.hidden, counted, self._ranks)

    def advance(self, index: int, into: HiddenStates | None = None) -> None:
        """Replace the hidden states by the output of block `index`, or write that `into` others."""
        block = self.block(index)
        target = self.hidden if into is None else into
        for sample in range(len(self.hidden)):
            target[sample] = block.run(sample)


@dataclass(frozen=True)
class Block:
    """One block of the model and its input."""

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
        """The counted tokens of a sample, of anything [1, tokens, …]."""
        counted = self.counted[sample]
        return states if counted is None else states[counted]

    @property
    def samples(self) -> int:
        """How many samples there are over all processes."""
        return self.ranks.total(len(self.inputs))

    @property
    def tokens(self) -> float:
        """Counted tokens of a sample, on average over all processes."""
        return self.ranks.total(counted_tokens(self.counted, self.inputs[0])) / self.samples


def activation_norms(
    block: Block, layers: dict[str, nn.Module], tokens: dict[str, int] | None = None
) -> dict[str, Tensor]:
    """{name: A [in_features]}, A_j = sqrt(mean over samples of the sum over counted tokens of x_j²), in float32."""

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        squares = x.square().sum(0)
        return squares if total is None else total + squares

    sums = sum_over_inputs(block, layers, add, tokens)
    return {name: (total / block.samples).sqrt_() for name, total in sums.items()}


@torch.no_grad()
def sum_over_inputs(
    block: Block,
    layers: dict[str, nn.Module],
    add: Callable[[Tensor | None, Tensor], Tensor],
    tokens: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """{name: a sum over the inputs of a layer}, over the samples of all processes.

    Layers that are called one after the other with the very same input (queries, keys and values, say) share one sum. A
    weight that is used in several places is measured in all of them.

    Args:
        add: (sum so far or None, input [tokens, in_features] in float32 without padding) -> new sum.
        tokens: filled with {name: tokens that the layer got, over all processes}; 0 for one that never ran.

    Raises:
        ModelError: a sum is NaN or infinite, or there is padding and a layer does not read all tokens of a sample.
    """
    sums: dict[str, Tensor] = {}
    got: Counter[str] = Counter()  # tokens
    ran: Counter[str] = Counter()  # in the sample at work
    latest: tuple[Tensor, Tensor | None, Tensor, set[str]] | None = None  # an input, a sum before and after it, whose
    counted: Tensor | None = None  # of the sample at work
    whole = True  # the first sample goes through the whole block: who knows whether a layer is called again

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

    with ExitStack() as hooks:
        for name, user in _users(block.module, layers):
            hooks.callback(user.register_forward_pre_hook(partial(measure, name)).remove)
        for sample, counted in enumerate(block.counted):  # noqa: B007 - `measure` reads `counted`
            ran.clear()
            with suppress(ForwardEnded):
                block.run(sample)
            whole = whole and (len(ran) < len(layers) or ran.total() > len(layers))
    device = block.inputs[0].device
    missing = [name for name in layers if name not in sums]
    if block.ranks.total(len(missing)):  # then processes may differ in which layers share a sum
        nothing = {name: torch.zeros(0, weight_matrix(layers[name]).shape[1], device=device) for name in missing}
        sums = {name: sums[name].clone() if name in sums else add(None, nothing[name]) for name in layers}
    block.ranks.sum_({id(sums[name]): sums[name] for name in layers}.values())
    if tokens is not None:
        counts = torch.tensor([got[name] for name in layers], device=device)
        block.ranks.sum_([counts])
        tokens.update(zip(layers, counts.tolist(), strict=True))
    for name, total in sums.items():
        check_finite(name, "activations", total)
    return sums


def _users(block: nn.Module, layers: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The layers by name, then all other modules of the block that multiply by the same weights."""
    weights = {name: layer.weight for name, layer in layers.items()}
    names = {id(weight): name for name, weight in weights.items()}
    of_layers = set(layers.values())
    others = [
        (names[id(weight)], module)
        for module in block.modules()
        if module not in of_layers and id(weight := module._parameters.get("weight")) in names
    ]
    return [*layers.items(), *others]


def _counted_tokens(name: str, inputs: Tensor, counted: Tensor | None) -> Tensor:
    """A layer's input as [tokens, in_features] in float32, without padding."""
    tokens = inputs.reshape(-1, inputs.shape[-1]).float()
    if counted is not None and len(tokens) != counted.numel():
        raise ModelError(
            f"{name}: the layer reads {len(tokens)} rows of a sample of {counted.numel()} tokens, so that padding "
            "cannot be told from text; give samples without padding, or add the layer to 'ignore'"
        )
    return tokens if counted is None else tokens[counted.flatten()]


def layer_statistics(
    block: Block | None, layers: dict[str, nn.Module], gradients: dict[str, Tensor], needs: Need
) -> dict[str, Statistics]:
    """The statistics of each layer.

    Args:
        block: None if none of `Need.BLOCKS` is needed.
        gradients: {name: G in the stored layout of the weight}; empty if it was not measured.
    """
    grams: dict[str, Tensor] = {}
    activations: dict[str, Tensor] = {}
    regional: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    if block is not None and layers:
        if Need.GRAM in needs:
            grams = gram_matrices(block, layers, tokens)
            activations = {name: activation_norms_of(gram, block.samples) for name, gram in grams.items()}
        elif Need.ACTIVATIONS in needs:
            activations = activation_norms(block, layers, tokens)
        if Need.REGIONAL in needs:
            regional = regional_norms(block, layers)

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


def gram_matrices(
    block: Block, layers: dict[str, nn.Module], tokens: dict[str, int] | None = None
) -> dict[str, Tensor]:
    """{name: H = XᵀX [in_features, in_features]} of every layer's input, in float32.

    The sum is over all counted tokens of all samples. Layers with the very same input share one matrix.
    """

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        return x.T @ x if total is None else total.addmm_(x.T, x)

    return sum_over_inputs(block, layers, add, tokens)


def regional_norms(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """{name: R} in float32, in the stored layout of the weight (Wanda++, arXiv 2503.04992).

    R = sqrt(mean over samples of (∇_W ‖block(X_n)‖₂)²), X_n the inputs of sample n.
    """
    weights = {name: layer.weight for name, layer in layers.items() if isinstance(layer.weight, Tensor)}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    with only_requires_grad(block.module, weights.values()), torch.enable_grad():
        for sample, hidden in enumerate(block.inputs):
            output = block.calls[sample].run(block.module, hidden)
            norm = block.without_padding(sample, output).float().norm()
            # An expert without a token takes no part.
            gradients = torch.autograd.grad(norm, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float())
    block.ranks.sum_(sums.values())
    for name, total in sums.items():
        check_finite(name, "gradients", total)
        total.div_(block.samples).sqrt_()
    return sums


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
