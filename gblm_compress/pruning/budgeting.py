"""The budgets of a model's layers: what the settings ask for, spread by what the dense model says of each layer."""

from collections.abc import Iterable

from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block, activation_norms
from gblm_compress.errors import UsageError
from gblm_compress.methods.allocation import Budget, GlobalRanking, outlier_share, owl, spread
from gblm_compress.methods.patterns import DENSE
from gblm_compress.methods.saliency import Statistics, wanda
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.settings import PruneSettings


def planned_budgets(model: nn.Module, settings: PruneSettings) -> dict[str, Budget]:
    """`uniform_budgets` of the layers of a model, whose weights may be on the meta device.

    Raises:
        UsageError, ModelError: also as `prunable_layers`.
    """
    blocks = prunable_layers(model, settings.targets, settings.ignore)
    return uniform_budgets({name: layer for block in blocks for name, layer in block.items()}, settings)


def uniform_budgets(layers: dict[str, nn.Module], settings: PruneSettings) -> dict[str, Budget]:
    """What the settings ask for each layer, exceptions included, before an allocation; reads shapes alone.

    Raises:
        UsageError: an exception matches no layer, all layers would stay dense, or a width does not divide by M.
    """
    result = settings.budgets(list(layers))
    if all(budget.pattern.name == DENSE for budget in result.values()):
        raise UsageError("the exceptions in 'overrides' leave every layer dense: there is nothing to prune")
    for name, layer in layers.items():
        pattern, width = result[name].pattern, weight_matrix(layer).shape[1]
        if not pattern.fits(width):
            assert pattern.n_m is not None
            raise UsageError(
                f"{name}: in_features={width} is not a multiple of {pattern.n_m[1]}, which pattern {pattern.name} "
                "needs; add it to --ignore, or choose another pattern"
            )
    return result


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
