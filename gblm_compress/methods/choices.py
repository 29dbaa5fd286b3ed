"""The base of all entries of `METHODS`, `FITS`, `QUANTISERS` and `ALLOCATIONS`, and the statistics that they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Need(Flag):
    """Measurements and memory that a choice needs."""

    NOTHING = 0
    ACTIVATIONS = auto()  # `Statistics.activation_norm`
    GRADIENTS = auto()  # `Statistics.gradient_norm`
    REGIONAL = auto()  # `Statistics.regional_norm`
    GRAM = auto()  # `Statistics.gram`, which gives the activation norms too
    FACTOR = auto()  # memory to factorise a Gram matrix in float64
    BLOCKS = ACTIVATIONS | REGIONAL | GRAM  # measured by running the blocks one by one on the text


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One entry of a registry; its function comes with the subclass."""

    help: str  # half a sentence for `--help` and the recipe reference
    needs: Need = Need.NOTHING  # measured for it
    reads: tuple[str, ...] = ()  # keys of `PruneSettings`; giving one that no choice reads is an error
    passes: float = 0.0  # cost besides its statistics, in forward passes over the calibration text
    synonyms: tuple[str, ...] = ()  # in other tools and papers

    @property
    def keys(self) -> tuple[str, ...]:
        return ("gradient_norm", *self.reads) if Need.GRADIENTS in self.needs else self.reads


@dataclass(frozen=True)
class Statistics:
    """Measurements of one layer on the calibration text. A field is None if no choice in use needs it.

    `activation_norm` is A_j = sqrt(mean over samples of the sum over tokens of x_j²). The mean follows the released
    code of Wanda and GBLM. The papers' ‖X_j‖₂ has no mean, which in gblm changes the weight of A against α·G.

    `gradient_norm` is (Σ_n |g_n|^p)^(1/p) over the samples' gradients g_n of the dense model's mean loss; p = 1 or 2.

    `regional_norm` is the root mean square over the samples of the gradients of ‖block(X_n)‖₂, of the dense block.
    """

    activation_norm: Tensor | None = None  # A [in_features]
    gradient_norm: Tensor | None = None  # G [out_features, in_features]
    regional_norm: Tensor | None = None  # R [out_features, in_features]
    gram: Tensor | None = None  # H = XᵀX [in_features, in_features], over all tokens of all samples
    tokens: int | None = None  # that the layer got, all or those of its expert; 0 if it never ran, None if not measured

    # A choice reads what it declares:

    def activations(self) -> Tensor:
        return _measured(self.activation_norm, "Need.ACTIVATIONS")

    def gradients(self) -> Tensor:
        return _measured(self.gradient_norm, "Need.GRADIENTS")

    def regional(self) -> Tensor:
        return _measured(self.regional_norm, "Need.REGIONAL")

    def moments(self) -> Tensor:
        return _measured(self.gram, "Need.GRAM")


def _measured(value: Tensor | None, need: str) -> Tensor:
    assert value is not None, f"a choice that reads this must declare {need}"
    return value


def readers(key: str, registries: Mapping[str, Mapping[str, Choice]]) -> list[str]:
    """The choices that read a key, for example ["method gblm or regional"]; empty if no choice declares it."""
    found = []
    for kind, registry in registries.items():
        names = [name for name, choice in registry.items() if key in choice.keys]
        if names:
            found.append(f"{kind} " + " or ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:]))
    return found


def describe(registry: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {choice.help}" for name, choice in registry.items())
