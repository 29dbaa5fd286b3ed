"""The statistics of a block's layers: Gram matrices and regional gradients here, beside what is measured elsewhere."""

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block, activation_norms, only_requires_grad, sum_over_inputs
from gblm_compress.methods.choices import Need, Statistics
from gblm_compress.methods.fits import activation_norms_of
from gblm_compress.methods.zeros import check_finite
from gblm_compress.models.architecture import as_matrix


def layer_statistics(
    block: Block | None, layers: dict[str, nn.Module], gradients: dict[str, Tensor], needs: Need
) -> dict[str, Statistics]:
    """What is known of each layer.

    Args:
        block: the block and its inputs; None if none of `Need.BLOCKS` is needed.
        layers: {name: Linear or Conv1D}; may be empty.
        gradients: {name: G in the stored layout of the weight}; empty if it was not measured.
        needs: what to measure.

    Returns:
        {name: its statistics; those of the size of the weight as [out_features, in_features]}.
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
    """H = XᵀX of every layer's input, summed over all counted tokens of all samples.

    Layers with the very same input share one matrix. The diagonal is N·A² of `calibration.activation_norms` for N
    samples.

    Args:
        tokens: as for `sum_over_inputs`.

    Returns:
        {name: H [in_features, in_features], float32}.

    Raises:
        ModelError: an activation is NaN or infinite; the message names the layer.
    """

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        return x.T @ x if total is None else total.addmm_(x.T, x)

    return sum_over_inputs(block, layers, add, tokens)


def regional_norms(block: Block, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """R = sqrt(mean over samples of (∇_W ‖block(X_n)‖₂)²), X_n the inputs of sample n (Wanda++, arXiv 2503.04992).

    What the block gives for padding is left out.

    Returns:
        {name: R in float32, in the stored layout of the weight}.

    Raises:
        ModelError: a gradient is NaN or infinite; the message names the layer.
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
