"""Allocations: the pattern and sparsity of each layer. Add one by listing it in `ALLOCATIONS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gblm_compress.methods.choices import Choice, Need, Statistics
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.methods.saliency import gradient

if TYPE_CHECKING:
    from torch import Tensor

DEVIATION = 0.25  # the largest change of a layer's density
_BINS, _LOWEST, _HIGHEST = 8192, -160.0, 96.0


@dataclass(frozen=True)
class Budget:
    """The pattern of one layer; `sparsity` is the fraction of zeros."""

    pattern: Pattern
    sparsity: float


def spread(budget: Budget, sizes: dict[str, int], densities: dict[str, float]) -> dict[str, Budget]:
    """Budgets that follow `densities` and keep as many weights in all as one `budget` for all layers.

    Each density stays within `DEVIATION` of the budget's; all are moved by one constant until the sum is right. For
    N:M, N ≥ 1 is rounded down, then up again in the layers nearest to the next N, while the sum allows it.
    """
    own, n_m = 1 - budget.sparsity, budget.pattern.n_m
    wanted = sum(own * size for size in sizes.values())
    least, most = (1 / n_m[1], 1.0) if n_m is not None else (0.01, 0.99)
    lowest, highest = max(own - DEVIATION, min(own, least)), min(own + DEVIATION, max(own, most))

    def limited(shift: float) -> dict[str, float]:
        return {name: min(max(densities[name] + shift, lowest), highest) for name in sizes}

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(value * sizes[name] for name, value in limited(middle).items()) < wanted:
            low = middle
        else:
            high = middle
    chosen = limited(low)
    if n_m is None:
        return {name: Budget(budget.pattern, 1 - density) for name, density in chosen.items()}
    return _whole_groups(chosen, sizes, n_m[1], wanted)


def _whole_groups(densities: dict[str, float], sizes: dict[str, int], m: int, wanted: float) -> dict[str, Budget]:
    """N:M of each layer, with Σ N/M · size just below `wanted` (largest remainder)."""
    kept = {name: int(density * m + 1e-9) for name, density in densities.items()}
    left = wanted * (1 + 1e-9) - sum(kept[name] / m * sizes[name] for name in kept)
    for name in sorted(kept, key=lambda name: kept[name] - densities[name] * m):
        if sizes[name] / m <= left and kept[name] < densities[name] * m:
            kept[name] += 1
            left -= sizes[name] / m
    patterns = {name: Pattern(DENSE) if n == m else Pattern(f"{n}:{m}") for name, n in kept.items()}
    return {name: Budget(pattern, pattern.sparsity(None)) for name, pattern in patterns.items()}


@dataclass(frozen=True)
class DenseLayer:
    name: str
    weight: Tensor  # W [out_features, in_features] in float32
    statistics: Statistics  # of the allocation's needs


# Each block is in memory only until the next is asked for; one may have no layers.
Blocks = Iterable[Iterable[DenseLayer]]


def uniform(blocks: Blocks, density: float) -> dict[str, float]:
    return {}


def by_sensitivity(blocks: Blocks, density: float) -> dict[str, float]:
    """How many of each layer's weights are among the most important of the whole model, by |W|·G.

    From a histogram of each layer: 8192 bins of a 32nd of a power of two; a score of zero is in the lowest.
    """
    histograms: dict[str, Tensor] = {}
    for block in blocks:
        for layer in block:
            logarithms = gradient(layer.weight, layer.statistics, 0.0).log2().clamp(_LOWEST, _HIGHEST)
            histograms[layer.name] = logarithms.histc(_BINS, _LOWEST, _HIGHEST).double()
    total = sum(histograms.values())
    above = total.flip(0).cumsum(0).flip(0)  # type: ignore[union-attr]
    first = int((above >= density * above[0]).sum()) - 1
    # The bin of the threshold is kept in part, the same part in every layer.
    part = float((density * above[0] - (above[first] - total[first])) / total[first])  # type: ignore[index]
    return {
        name: float((histogram[first + 1 :].sum() + part * histogram[first]) / histogram.sum())
        for name, histogram in histograms.items()
    }


@dataclass(frozen=True)
class Allocation(Choice):
    # (layers without an exception, mean fraction to keep) -> {name: fraction to keep}; empty: all keep their budgets
    densities: Callable[[Blocks, float], dict[str, float]]


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform, help="the same everywhere"),
    "sensitivity": Allocation(
        by_sensitivity, help="one threshold on the gradient scores of the whole model", needs=Need.GRADIENTS
    ),
}
