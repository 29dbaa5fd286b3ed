"""What a block's own inputs tell of its layers, beside the activation norms: Gram matrices and regional gradients."""

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block, only_requires_grad, sum_over_inputs
from gblm_compress.models.architecture import check_finite


def gram_matrices(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """H = XᵀX of every layer's input, summed over all tokens of all samples.

    Layers with the very same input share one matrix. The diagonal is N·A² of `calibration.activation_norms` for N
    samples.

    Returns:
        {name: H [in_features, in_features], float32}.

    Raises:
        ModelError: an activation is NaN or infinite, or a layer never ran; the message names the layer.
    """

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        return x.T @ x if total is None else total.addmm_(x.T, x)

    return sum_over_inputs(block, layers, add)


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
