"""Reconstruction: the surviving weights of one block, fitted so that its output is that of the dense model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gblm_compress.calibration.blocks import Block, only_requires_grad
from gblm_compress.methods.quantisation import Grid
from gblm_compress.methods.zeros import keep_only
from gblm_compress.training.fitting import Fit, fit
from gblm_compress.training.masters import Masters


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
    grids: Mapping[str, Grid] | None = None,
) -> tuple[Fit, dict[str, Grid]]:
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
        grids: {name: grid} of the layers whose survivors are rounded; what their weights hold need not be.

    Returns:
        The relative error on held-out samples before the first round and after the best, and that round's epochs; and
        the grids, with their scales fitted.
    """
    names = {id(module): name for name, module in block.module.named_modules()}
    keys = {name: f"{names[id(layer)]}.weight" for name, layer in layers.items()}
    grids = grids or {}
    masters = Masters(
        {keys[name]: layer for name, layer in layers.items()}, {keys[name]: grid for name, grid in grids.items()}
    )

    def loss(seen: dict[str, Tensor], index: int) -> Tensor:
        weights = masters.for_products(seen, compute)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.module, weights, args, kwargs)

        hidden = block.inputs[index]
        with autocast(hidden.device, compute):
            output = block.calls[index].run(call, hidden)
        return relative_error(block.without_padding(index, output), block.without_padding(index, targets[index]))

    fits: list[Fit] = []
    current = best = masters.start
    with only_requires_grad(block.module, []):
        for left in reversed(range(rounds)):
            values, found = fit(
                current, loss, len(block.inputs), epochs=epochs, rate=rate, revive=left > 0, project=masters.seen
            )
            if all(found.after < earlier.after for earlier in fits):
                best = {key: keep_only(values[key], current[key] != 0) for key in values}
            fits.append(found)
            if left == 0 or found.epochs == 0:  # the last; or one that moved nothing, and so would those after it
                break
            assert choose is not None, "several rounds need a choice of masks"
            current = values | {key: keep_only(values[key], choose(name, values[key])) for name, key in keys.items()}
            del values
    written = masters.write_(best)
    result = replace(min(fits, key=lambda one: one.after), before=fits[0].before)
    return result, {name: written[keys[name]] for name in grids}


def autocast(device: torch.device, compute: str) -> torch.autocast:
    """Products in `compute`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == "bfloat16")
