"""Methods: which weights of a layer survive. Add a method by writing one function and listing it in `METHODS`.

Most give a weight W [out_features, in_features] in float32 a score of its shape. The lowest scores in each group of the
pattern are pruned. A method that chooses its mask in another way returns a `Selection`, as `obs` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gblm_compress.methods.choices import Choice, Need, Statistics
from gblm_compress.methods.fits import sparsegpt
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.zeros import check_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """The inputs of a method besides a layer's weight and statistics."""

    layer: str  # its name, for messages
    pattern: Pattern
    sparsity: float  # fraction of zeros
    alpha: float  # factor of the gradient term


@dataclass(frozen=True)
class Selection:
    """The mask that a method chose, and the fit that it made along the way, if any."""

    keep: Tensor  # [out_features, in_features], True = keep
    fitted: Mapping[str, Tensor] = field(default_factory=dict)  # {fit: weight of W's shape}


@dataclass(frozen=True)
class Method(Choice):
    select: Callable[[Tensor, Statistics, Rule], Selection]


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

    The best α depends on the calibration. In the released code A grows with the square root of the tokens in a sample,
    G with the samples (p = 1) or their square root (p = 2). The published α = 100 is for 128 samples of 2048 tokens.
    """
    return weight.abs() * (statistics.activations() + alpha * statistics.gradients())


def regional(weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """|W|·(A + α·R) (Wanda++, arXiv 2503.04992, eq. 4: regional gradient score, published with α = 100).

    Both terms grow with the square root of the tokens in a sample and not with the number of samples.
    """
    return weight.abs() * (statistics.activations() + alpha * statistics.regional())


def by_score(score: Callable[[Tensor, Statistics, float], Tensor]) -> Callable[[Tensor, Statistics, Rule], Selection]:
    """The method that keeps the highest scores; it raises ModelError if one is NaN or infinite."""

    def select(weight: Tensor, statistics: Statistics, rule: Rule) -> Selection:
        scores = score(weight, statistics, rule.alpha)
        if scores.shape != weight.shape:
            raise ValueError(f"a score has the weight's shape {list(weight.shape)}, not {list(scores.shape)}")
        check_finite(rule.layer, "scores", scores)
        return Selection(rule.pattern.mask(scores, weight, rule.sparsity))

    return select


def obs(weight: Tensor, statistics: Statistics, rule: Rule) -> Selection:
    """SparseGPT's mask, which follows the weights while fit `obs` moves them (`fits.sparsegpt`)."""
    fitted, keep = sparsegpt(weight, statistics.moments(), rule.pattern, rule.sparsity)
    return Selection(keep, {"obs": fitted})


METHODS: dict[str, Method] = {
    "gblm": Method(
        by_score(gblm),
        help="magnitude × (input norm + alpha × gradient norm)",
        needs=Need.ACTIVATIONS | Need.GRADIENTS,
        reads=("alpha",),
        synonyms=("GBLM-Pruner",),
    ),
    "wanda": Method(by_score(wanda), help="magnitude × input norm", needs=Need.ACTIVATIONS),
    "gradient": Method(by_score(gradient), help="magnitude × gradient norm", needs=Need.GRADIENTS),
    "magnitude": Method(by_score(magnitude), help="magnitude alone"),
    "regional": Method(
        by_score(regional),
        help="magnitude × (input norm + alpha × norm of the block's own gradient), of Wanda++",
        needs=Need.ACTIVATIONS | Need.REGIONAL,
        reads=("alpha",),
        synonyms=("Wanda++", "Wanda-pp"),
    ),
    "obs": Method(obs, help="the choice of SparseGPT", needs=Need.GRAM | Need.FACTOR, synonyms=("SparseGPT",)),
}
