"""What a block's own inputs tell of its layers, beside the activation norms: Gram matrices and regional gradients."""

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from gblm_compress.architecture import check_finite
from gblm_compress.calibration import Block, only_requires_grad
from gblm_compress.errors import ModelError


@torch.no_grad()
def gram_matrices(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """H = XᵀX of every layer's input, summed over all tokens of all samples.

    Layers that are called one after the other with the very same input (queries, keys and values, say) share one
    matrix. The diagonal is N·A² of `calibration.activation_norms` for N samples.

    Returns:
        {name: H [in_features, in_features], float32}.

    Raises:
        ModelError: an activation is NaN or infinite, or a layer never ran; the message names the layer.
    """
    grams: dict[str, Tensor] = {}
    latest: list[tuple[Tensor, str]] = []

    def accumulate(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if latest and args[0] is latest[0][0]:
            grams[name] = grams[latest[0][1]]
            return
        inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        if name not in grams:
            grams[name] = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        grams[name].addmm_(inputs.T, inputs)
        latest[:] = [(args[0], name)]

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(accumulate, name)).remove)
        for hidden in block.inputs:
            block.run(hidden)
            latest.clear()
    if missing := sorted(set(layers) - set(grams)):
        raise ModelError(f"{missing[0]}: the layer never ran on the calibration text; add it to 'ignore'")
    block.ranks.sum_({id(grams[name]): grams[name] for name in layers}.values())
    for name, gram in grams.items():
        check_finite(name, "activations", gram)
    return grams


def regional_norms(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """R = sqrt(mean over samples of (∇_W ‖block(X_n)‖₂)²), X_n the inputs of sample n (Wanda++, arXiv 2503.04992).

    Returns:
        {name: R in float32, in the stored layout of the weight}.

    Raises:
        ModelError: a gradient is NaN or infinite; the message names the layer.
    """
    weights = {name: layer.weight for name, layer in layers.items() if isinstance(layer.weight, Tensor)}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    with only_requires_grad(block.module, weights.values()), torch.enable_grad():
        for hidden in block.inputs:
            norm = block.call.run(block.module, hidden).float().norm()
            for total, gradient in zip(sums.values(), torch.autograd.grad(norm, list(weights.values())), strict=True):
                total.addcmul_(gradient.float(), gradient.float())
    block.ranks.sum_(sums.values())
    for name, total in sums.items():
        check_finite(name, "gradients", total)
        total.div_(block.samples).sqrt_()
    return sums
