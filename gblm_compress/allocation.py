"""Allocation: which pattern and sparsity each layer gets.

Today there are two: the same for every layer, and explicit exceptions by layer name. A method that computes
a budget per layer is one more function from layers to `Budget`s.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gblm_compress.errors import UsageError
from gblm_compress.patterns import Pattern


@dataclass(frozen=True)
class Budget:
    """What one layer may keep.

    Attributes:
        pattern: which weights compete.
        sparsity: fraction of zeros.
    """

    pattern: Pattern
    sparsity: float


@dataclass(frozen=True)
class Override:
    """An exception to the uniform allocation, for the layers whose full name matches `layers`."""

    layers: str
    budget: Budget


def allocate(names: Iterable[str], uniform: Budget, overrides: tuple[Override, ...]) -> dict[str, Budget]:
    """The budget of every layer; where several overrides match, the last one counts.

    Raises:
        UsageError: an override matches no layer.
    """
    names = list(names)
    budgets = dict.fromkeys(names, uniform)
    for override in overrides:
        matches = [name for name in names if fnmatchcase(name, override.layers)]
        if not matches:
            raise UsageError(
                f"override {override.layers!r} matches none of the pruned layers, for example {names[0]!r}"
            )
        budgets.update(dict.fromkeys(matches, override.budget))
    return budgets
