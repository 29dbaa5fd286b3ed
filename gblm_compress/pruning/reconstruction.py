"""Reconstruction: the surviving weights of one block, fitted so that its output is that of the dense model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gblm_compress.calibration.blocks import Block, only_requires_grad
from gblm_compress.methods.zeros import keep_only, positive_zeros
from gblm_compress.pruning.fitting import Fit, fit


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖output − target‖² / ‖target‖²; both [..., tokens, hidden size], in float32.

    The next block normalises every token by its norm, so that this is the error it sees. In a plain mean of squares
    the few tokens with huge activations would count for all.
    """
    output, target = output.float(), target.float()
    scale = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output - target).square().sum(-1) / scale).mean()


def reconstruct_(
    block: Block,
    layers: dict[str, nn.Module],
    targets: Sequence[Tensor],
    *,
    epochs: int,
    rate: float,
    compute: str,
    rounds: int = 1,
    choose: Callable[[str, Tensor], Tensor] | None = None,
) -> Fit:
    """Fit the surviving weights of a pruned block by Adam, in place (regional optimisation, Wanda++, arXiv 2503.04992).

    In all rounds but the last the pruned weights gather steps too, and the next round begins with the mask of the
    weights as they have become. The round with the lowest error on held-out samples counts.

    Args:
        block: the block, already pruned, with the inputs that come from the pruned blocks before it.
        layers: {name: its pruned layers}.
        targets: what the block should give for each of its inputs, each [1, length, hidden size].
        epochs: at most this many passes over the samples that are not held out.
        rate: learning rate relative to each layer's root mean square weight.
        compute: float32 or bfloat16, of the products; weights and optimiser states are float32.
        rounds: how many fits of `epochs` each.
        choose: of (name, values of a layer as it stores its weight), the mask for them; needed for several rounds.

    Returns:
        The relative error on held-out samples before the first round and after the best, and that round's epochs.
    """
    names = {id(module): name for name, module in block.module.named_modules()}
    keys = {name: f"{names[id(layer)]}.weight" for name, layer in layers.items()}
    weights = {keys[name]: _weight(layer) for name, layer in layers.items()}

    def loss(masters: dict[str, Tensor], index: int) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.module, _like(masters, weights), args, kwargs)

        hidden = block.inputs[index]
        with autocast(hidden.device, compute):
            output = block.calls[index].run(call, hidden)
        return relative_error(block.without_padding(index, output), block.without_padding(index, targets[index]))

    fits: list[Fit] = []
    current = best = weights
    with only_requires_grad(block.module, []):
        for left in reversed(range(rounds)):
            values, found = fit(current, loss, len(block.inputs), epochs=epochs, rate=rate, revive=left > 0)
            if all(found.after < earlier.after for earlier in fits):
                best = {key: keep_only(values[key], current[key] != 0) for key in values}
            fits.append(found)
            if left == 0 or found.epochs == 0:  # the last; or one that moved nothing, and so would those after it
                break
            assert choose is not None, "several rounds need a choice of masks"
            current = {key: keep_only(values[key], choose(name, values[key])) for name, key in keys.items()}
            del values
    write_(weights, best)
    return replace(min(fits, key=lambda one: one.after), before=fits[0].before)


def autocast(device: torch.device, compute: str) -> torch.autocast:
    """Products in `compute`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == "bfloat16")


@torch.no_grad()
def write_(weights: dict[str, Tensor], fitted: dict[str, Tensor]) -> None:
    """Copy fitted weights into the model's own, in their dtype; zeros are +0.0."""
    for key, weight in weights.items():
        weight.copy_(positive_zeros(fitted[key].to(weight.dtype)))


def _like(masters: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: master.to(weights[key].dtype) for key, master in masters.items()}


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()
