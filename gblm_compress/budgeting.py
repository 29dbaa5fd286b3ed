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
    dense: Iterable[tuple[Block | None, dict[str, Tensor]]],
) -> dict[str, Budget]:
    """How much each layer keeps.

    Args:
        per_block: the layers to prune, block by block.
        dense: for each block of the dense model, whose weights must be there when it is asked for: the block with its
            inputs, which allocation owl reads, and {name: G in the stored layout of the weight}, which allocation
            sensitivity reads. Not touched by allocation uniform.

    Raises:
        UsageError: an override matches no layer.
    """
    names = [name for layers in per_block for name in layers]
    uniform = settings.budgets(names)
    if settings.allocation == "uniform" or all(map(settings.is_exception, names)):
        return uniform
    density = 1 - settings.uniform_budget.sparsity
    sizes: dict[str, int] = {}
    shares: dict[str, float] = {}
    ranking = GlobalRanking()
    for layers, (block, gradients) in zip(per_block, dense, strict=True):
        free = {name: layer for name, layer in layers.items() if not settings.is_exception(name)}
        sizes |= {name: weight_matrix(layer).numel() for name, layer in free.items()}
        if settings.allocation == "sensitivity":
            for name, layer in free.items():
                ranking.add(name, layer.get_parameter("weight").detach().abs() * gradients[name])
        elif free:
            assert block is not None, "owl reads the inputs of the dense blocks"
            shares |= dict.fromkeys(free, _outlier_share(block, free))
    densities = (
        ranking.densities(density) if settings.allocation == "sensitivity" else owl(shares, density, settings.deviation)
    )
    return uniform | spread({name: uniform[name] for name in sizes}, sizes, densities, settings.deviation)


def _outlier_share(block: Block, layers: dict[str, nn.Module]) -> float:
    norms = activation_norms(block, layers)
    return outlier_share(
        [wanda(weight_matrix(layer).detach().float(), Statistics(norms[name]), 0.0) for name, layer in layers.items()]
    )
