"""Mask rules: whether the mask of a layer stays, or is learned, while the survivors are trained. Pure functions.

A rule keeps a mask [out_features, in_features] (True = keep) beside the weights of a layer and says what the network
sees of them, what becomes of their gradients, and which mask follows a step. Add one by writing it and
listing it in `MASK_RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gblm_compress.methods.patterns import UNSTRUCTURED, Pattern
from gblm_compress.methods.proximal import proximal

if TYPE_CHECKING:
    from torch import Tensor

LAST_EXCHANGE = 0.75
"""The share of the training after which masks that are learned stay as they are, so that the weights settle."""

EXCHANGED = 0.03
"""The share of a row's survivors that the first exchange replaces."""


@dataclass(frozen=True)
class Moment:
    """Where in the training a step is.

    Attributes:
        step: from 0.
        steps: how many there will be.
        every: steps between two changes of the mask.
    """

    step: int
    steps: int
    every: int

    @property
    def changes(self) -> bool:
        """Whether the mask may change after this step."""
        return (self.step + 1) % self.every == 0 and self.step + 1 <= LAST_EXCHANGE * self.steps

    @property
    def settled(self) -> bool:
        """Whether the mask stays as it is from here to the end."""
        return self.step + 1 > LAST_EXCHANGE * self.steps

    @property
    def share(self) -> float:
        """What is left of a share that falls to nothing as a half cosine (RigL, arXiv 1911.11134, section 3)."""
        return 0.5 * (1 + math.cos(math.pi * (self.step + 1) / (LAST_EXCHANGE * self.steps)))


@dataclass(frozen=True)
class Layer:
    """One layer after a step, all [out_features, in_features].

    Attributes:
        weight: in float32.
        gradient: of the loss to what the network saw, at the step.
        power: gives the running mean of the squares of the gradient by which the weight moves, Adam's second moment.
        keep: its mask in that step.
        pattern, sparsity: what a mask must have.
    """

    weight: Tensor
    gradient: Tensor
    power: Callable[[], Tensor]
    keep: Tensor
    pattern: Pattern
    sparsity: float

    def largest(self) -> Tensor:
        """The mask of the largest weights."""
        return self.pattern.mask(self.weight.abs(), self.weight, self.sparsity)


@dataclass(frozen=True)
class MaskRule:
    """An entry of `MASK_RULES`: masks that stay as they are.

    Attributes:
        help: what happens to the mask, as half a sentence for `--help` and the recipe reference.
        only: the pattern that it is for, where not any; "unstructured" stands for all that are not N:M.
        reads: the keys of `RecoverSettings` that it reads and others may not; giving one in vain is refused.
        moves: whether the mask changes.
        relaxes: whether the network is trained with pruned weights too, until masks are settled.
    """

    help: str
    only: str = ""
    reads: tuple[str, ...] = ()
    moves: bool = False
    relaxes: bool = False

    def takes(self, pattern: Pattern) -> bool:
        """Whether it does for a pattern."""
        return self.only in ("", pattern.name) or (self.only == UNSTRUCTURED and pattern.n_m is None)

    def seen(self, weight: Tensor, keep: Tensor) -> Tensor:
        """What the network multiplies by in training; differentiable."""
        return weight

    def gradient(self, weight: Tensor, gradient: Tensor, keep: Tensor, decay: float, moment: Moment) -> Tensor:
        """The gradient by which the weight moves."""
        return gradient * keep

    def next_mask(self, layer: Layer, moment: Moment) -> Tensor:
        """The mask after a step."""
        return layer.keep

    def after(self, weight: Tensor, before: Tensor, keep: Tensor, pull: float, moment: Moment) -> Tensor:
        """The weight with which training goes on after a step, in which the mask `before` has become `keep`.

        Args:
            pull: `mask_pull` in shares of the step, in units of 1 / weight.
        """
        return weight


class Learned(MaskRule):
    """A mask that changes: pruned weights get the gradients of what is seen in their place, which is zero."""

    def seen(self, weight: Tensor, keep: Tensor) -> Tensor:
        return weight + (weight * ~keep).neg().detach()


class StraightThrough(Learned):
    """SR-STE (arXiv 2102.04010, equation 9): pruned weights live on, take the gradients of what is seen in their place,
    and decay; the mask is of the largest weights."""

    def gradient(self, weight: Tensor, gradient: Tensor, keep: Tensor, decay: float, moment: Moment) -> Tensor:
        return gradient + decay * weight * ~keep

    def next_mask(self, layer: Layer, moment: Moment) -> Tensor:
        return layer.largest() if moment.changes else layer.keep


class Exchange(Learned):
    """RigL (arXiv 1911.11134): from time to time some survivors of a row make room for as many pruned weights, those
    with the largest gradients, which start from zero.

    RigL gives up the smallest. Those of a mask by saliency are small because their inputs are large, so that here those
    are given up whose loss would rise least, by w² times the mean squared gradient (optimal brain damage with the
    diagonal of the Fisher information).
    """

    def next_mask(self, layer: Layer, moment: Moment) -> Tensor:
        keep, inf = layer.keep, float("inf")
        if not moment.changes:
            return keep
        survivors, pruned = keep.sum(1), (~keep).sum(1)
        number = (EXCHANGED * moment.share * survivors).long().minimum(pruned)
        # Ranks within a row, from 0: of survivors by what they are worth, of pruned weights by gradient.
        worth = (layer.weight.square() * layer.power()).masked_fill(~keep, inf)
        weakest = worth.argsort(dim=1, stable=True).argsort(dim=1)
        wanted = layer.gradient.abs().masked_fill(keep, -inf)
        strongest = wanted.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        leave = keep & (weakest < number[:, None])
        enter = ~keep & (strongest < number[:, None])
        return (keep & ~leave) | enter

    def after(self, weight: Tensor, before: Tensor, keep: Tensor, pull: float, moment: Moment) -> Tensor:
        # Adam's momentum moves a weight on after it was pruned.
        return weight if keep is before else weight * (before & keep)


class Proximal(MaskRule):
    """ProxSparse (arXiv 2502.00258): the network has all weights, and after every step each group of four is drawn to
    two (`proximal`); the mask is of the largest. Once masks are settled, the pruned weights are zero. The term of the
    paper that holds weights to their first values is left out, since these are trained to the end."""

    def gradient(self, weight: Tensor, gradient: Tensor, keep: Tensor, decay: float, moment: Moment) -> Tensor:
        return gradient * keep if moment.settled else gradient

    def next_mask(self, layer: Layer, moment: Moment) -> Tensor:
        return layer.keep if moment.settled else layer.largest()

    def after(self, weight: Tensor, before: Tensor, keep: Tensor, pull: float, moment: Moment) -> Tensor:
        return weight * keep if moment.settled else proximal(weight.reshape(-1, 4), pull).reshape(weight.shape)


MASK_RULES: dict[str, MaskRule] = {
    "fixed": MaskRule("the mask stays as it is"),
    "sr-ste": StraightThrough(
        "pruned weights are trained too and decay, and the largest weights are the mask (any pattern)",
        reads=("mask_every", "mask_decay"),
        moves=True,
    ),
    "exchange": Exchange(
        f"the least important survivors of each row make room for weights with large gradients ({UNSTRUCTURED} only)",
        only=UNSTRUCTURED,
        reads=("mask_every",),
        moves=True,
    ),
    "proximal": Proximal(
        "all weights are trained, and each four of them are drawn to two (2:4 only)",
        only="2:4",
        reads=("mask_pull",),
        moves=True,
        relaxes=True,
    ),
}
"""All rules."""
