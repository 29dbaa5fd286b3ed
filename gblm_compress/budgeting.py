"""The budgets of a model's layers: what the settings ask for, spread by what the dense model says of each layer."""

from collections.abc import Iterable

from torch import Tensor, nn

from gblm_compress.allocation import Budget, GlobalRanking, outlier_share, owl, spread
from gblm_compress.architecture import weight_matrix
from gblm_compress.calibration import Block, activation_norms
from gblm_compress.saliency import Statistics, wanda
from gblm_compress.settings import PruneSettings


def budgets(
    per_block: list[dict[str, nn.Module]],
    settings: PruneSettings,
    gradients: dict[str, Tensor],
    dense_blocks: Iterable[Block],
) -> dict[str, Budget]:
    """How much each layer keeps.

    Args:
        per_block: the layers to prune, block by block, in the dense model.
        gradients: {name: G in the stored layout of the weight}; read by allocation sensitivity.
        dense_blocks: each block with its inputs in the dense model; read by allocation owl.

    Raises:
        UsageError: an override matches no layer.
    """
    layers = {name: layer for block in per_block for name, layer in block.items()}
    uniform = settings.budgets(list(layers))
    if settings.allocation == "uniform":
        return uniform
    free = {name: uniform[name] for name in layers if not settings.is_exception(name)}
    density = 1 - settings.uniform_budget.sparsity
    if settings.allocation == "owl":
        shares: dict[str, float] = {}
        for block_layers, block in zip(per_block, dense_blocks, strict=True):
            taking_part = {name: layer for name, layer in block_layers.items() if name in free}
            if taking_part:
                shares |= dict.fromkeys(taking_part, _outlier_share(block, taking_part))
        densities = owl(shares, density, settings.deviation)
    else:
        ranking = GlobalRanking()
        for name in free:
            ranking.add(name, layers[name].weight.detach().abs() * gradients[name])  # type: ignore[operator]
        densities = ranking.densities(density)
    sizes = {name: weight_matrix(layers[name]).numel() for name in free}
    return uniform | spread(free, sizes, densities, settings.deviation)


def _outlier_share(block: Block, layers: dict[str, nn.Module]) -> float:
    norms = activation_norms(block, layers)
    return outlier_share(
        wanda(weight_matrix(layer).detach().float(), Statistics(norms[name]), 0.0) for name, layer in layers.items()
    )
