"""The budgets of a model's layers: what the settings ask for, spread by what the dense model says of each layer."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from gblm_compress.calibration.block_statistics import layer_statistics
from gblm_compress.calibration.blocks import Block
from gblm_compress.errors import UsageError
from gblm_compress.methods.allocation import ALLOCATIONS, Budget, DenseLayer, spread
from gblm_compress.methods.choices import Need
from gblm_compress.methods.patterns import DENSE
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.settings import PruneSettings


def skeleton_budgets(skeleton: nn.Module, settings: PruneSettings) -> dict[str, Budget]:
    """`uniform_budgets` of the layers of a model whose weights may be on the meta device.

    Raises:
        UsageError, ModelError: also as `prunable_layers`.
    """
    blocks = prunable_layers(skeleton, settings.targets, settings.ignore)
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
            inputs, or None if the allocation needs nothing that is measured on them, and {name: G in the stored layout
            of the weight}, empty if it needs none. Not touched by an allocation that looks at no block.

    Raises:
        UsageError: an override matches no layer.
    """
    uniform = settings.budgets([name for layers in per_block for name in layers])
    free = [{name: layer for name, layer in layers.items() if not settings.is_exception(name)} for layers in per_block]
    if not any(free):
        return uniform
    allocation = ALLOCATIONS[settings.allocation]
    blocks = (
        _measured(block, layers, gradients, allocation.needs)
        for layers, (block, gradients) in zip(free, dense, strict=True)
    )
    densities = allocation.densities(blocks, 1 - settings.uniform_budget.sparsity, settings.deviation)
    if not densities:
        return uniform
    sizes = {name: weight_matrix(layer).numel() for layers in free for name, layer in layers.items()}
    return uniform | spread({name: uniform[name] for name in sizes}, sizes, densities, settings.deviation)


def _measured(
    block: Block | None, layers: dict[str, nn.Module], gradients: dict[str, Tensor], needs: Need
) -> Iterator[DenseLayer]:
    statistics = layer_statistics(block, layers, gradients, needs)
    for name, layer in layers.items():
        yield DenseLayer(name, weight_matrix(layer).detach().float(), statistics[name])
