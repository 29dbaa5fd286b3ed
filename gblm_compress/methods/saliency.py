"""Saliency: what a weight is worth. One pure function a method; add a method by writing one and listing it.

All take the weight W [out_features, in_features] in float32 and the layer's `Statistics`, and return a score of
W's shape; the weights with the lowest score are pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What calibration measured of one layer. A field is None where no saliency in use needs it.

    Attributes:
        activation_norm: A [in_features], A_j = sqrt(mean over samples of the sum over tokens of x_j²). The division by
            the number of samples is that of the released code of Wanda and GBLM; the formula of the papers, ‖X_j‖₂ over
            all tokens, has none. It changes no order of wanda, but the weight of A beside α·G in gblm.
        gradient_norm: G [out_features, in_features], (Σ_n |g_n|^p)^(1/p) over the samples' gradients g_n of
            the mean token cross-entropy of the dense model; p = 1 or 2.
        regional_norm: R [out_features, in_features], the root mean square over the samples of the gradients of
            ‖block(X_n)‖₂, the norm of the dense block's whole output.
        gram: H [in_features, in_features], XᵀX over all tokens of all samples.
    """

    activation_norm: Tensor | None = None
    gradient_norm: Tensor | None = None
    regional_norm: Tensor | None = None
    gram: Tensor | None = None

    def activations(self) -> Tensor:
        """A, where a saliency that declares the need for it may rely on it."""
        assert self.activation_norm is not None, "this saliency must declare that it needs activations"
        return self.activation_norm

    def gradients(self) -> Tensor:
        """G, where a saliency that declares the need for it may rely on it."""
        assert self.gradient_norm is not None, "this saliency must declare that it needs gradients"
        return self.gradient_norm


def magnitude(weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """|W|."""
    return weight.abs()


def gradient(weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """|W|·G: the first-order change of the loss, accumulated over samples (arXiv 2311.04902, gradient only)."""
    return weight.abs() * statistics.gradients()


def wanda(weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """|W|·A (Sun et al., arXiv 2306.11695, eq. 1)."""
    return weight.abs() * statistics.activations()


def gblm(weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """|W|·(A + α·G) (Das et al., arXiv 2311.04902, Algorithm 1).

    α is not free of scale, and belongs to A as the released code computes it: A grows with the square root of the
    tokens in a sample, G with the number of samples (p = 1) or its square root (p = 2). The published α = 100 belongs
    to 128 samples of 2048 tokens.
    """
    return weight.abs() * (statistics.activations() + alpha * statistics.gradients())


def regional(weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """|W|·(A + α·R) (Wanda++, arXiv 2503.04992, eq. 4: regional gradient score, published with α = 100).

    Both terms grow with the square root of the tokens in a sample and not with the number of samples.
    """
    assert statistics.regional_norm is not None, "this saliency must declare that it needs regional gradients"
    return weight.abs() * (statistics.activations() + alpha * statistics.regional_norm)


@dataclass(frozen=True)
class Saliency:
    """A scoring function and the statistics it reads.

    Attributes:
        score: None for obs, which has no score of a weight alone: its mask follows the weights while others make up
            for those that are gone (`updates.sparsegpt`).
    """

    score: Callable[[Tensor, Statistics, float], Tensor] | None
    needs_activations: bool = False
    needs_gradients: bool = False
    needs_regional: bool = False
    needs_gram: bool = False


SALIENCIES: dict[str, Saliency] = {
    "magnitude": Saliency(magnitude),
    "gradient": Saliency(gradient, needs_gradients=True),
    "wanda": Saliency(wanda, needs_activations=True),
    "gblm": Saliency(gblm, needs_activations=True, needs_gradients=True),
    "regional": Saliency(regional, needs_activations=True, needs_regional=True),
    "obs": Saliency(None, needs_gram=True),
}
