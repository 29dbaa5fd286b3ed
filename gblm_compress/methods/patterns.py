"""Sparsity patterns: in each group of weights, the highest scores survive. `True` in a mask means *keep*."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from gblm_compress.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

UNSTRUCTURED = "unstructured"
PER_MATRIX = "unstructured-per-matrix"
DENSE = "dense"
N_M = "[1-9][0-9]{0,4}:[1-9][0-9]{0,4}"
FEW = 16  # largest group in which comparing all pairs is faster than selecting


@dataclass(frozen=True)
class Pattern:
    """A pattern by its name; raises UsageError for an unknown one.

    `unstructured`: the weights of one output row compete. `unstructured-per-matrix`: all weights of a matrix compete.
    `N:M`: at most N nonzeros in every M consecutive weights along the input. `dense`: nothing is pruned.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name in (UNSTRUCTURED, PER_MATRIX, DENSE):
            return
        n, _, m = self.name.partition(":")
        if not re.fullmatch(N_M, self.name) or int(n) >= int(m):
            raise UsageError(
                f"pattern {self.name!r} is not known; give '{UNSTRUCTURED}', '{PER_MATRIX}' "
                "or 'N:M' with 0 < N < M (for example 2:4: at most 2 nonzeros in every 4 weights)"
            )

    @cached_property
    def n_m(self) -> tuple[int, int] | None:
        """(N, M); None for an unstructured pattern."""
        if ":" not in self.name:
            return None
        n, m = self.name.split(":")
        return int(n), int(m)

    def sparsity(self, requested: float | None) -> float:
        """The fraction of zeros: implied by N:M and dense, else `requested` or 0.5; `UsageError` if both differ."""
        if requested is not None and not 0.0 < requested < 1.0:
            raise UsageError(f"sparsity is {requested}; give a fraction between 0 and 1, for example 0.5")
        if self.n_m is None and self.name != DENSE:
            return 0.5 if requested is None else requested
        implied = 1 - self.n_m[0] / self.n_m[1] if self.n_m else 0.0
        if requested is not None and abs(requested - implied) > 1e-9:
            raise UsageError(
                f"sparsity {requested} contradicts pattern {self.name}, which fixes it at {implied:g}; "
                "leave the sparsity out, or use an unstructured pattern"
            )
        return implied

    def mask(self, score: Tensor, weight: Tensor, sparsity: float, before: int = 0) -> Tensor:
        """True for the highest scores; all tensors are [out_features, in_features]. Magnitude breaks ties.

        `before`: columns whose mask is chosen already; the fraction `sparsity` of zeros holds for all together.
        """
        rows, columns = score.shape
        if self.n_m is not None:
            keep, group = self.n_m
        else:
            across = 1 if self.name == UNSTRUCTURED else rows
            group = across * columns
            keep = group - (int(across * (before + columns) * sparsity) - int(across * before * sparsity))
        kept = keep_largest(score.reshape(-1, group), weight.abs().reshape(-1, group), keep)
        return kept.reshape(rows, columns)

    def first_violation(self, weight: Tensor) -> str | None:
        """Where a weight [out_features, in_features] breaks an N:M pattern, as text; None if nowhere."""
        if self.n_m is None:
            return None
        n, m = self.n_m
        if weight.shape[1] % m:
            return f"in_features={weight.shape[1]} is not a multiple of {m}"
        counts = (weight != 0).reshape(weight.shape[0], -1, m).sum(-1)
        if not (counts > n).any():
            return None
        row, group = (counts > n).nonzero()[0].tolist()
        found = int(counts[row, group])
        return f"row {row}, columns {group * m} to {group * m + m - 1}: {found} nonzeros, at most {n} allowed"


def keep_largest(score: Tensor, magnitude: Tensor, keep: int) -> Tensor:
    """Mark exactly the `keep` largest scores in every row of [groups, size].

    Ties of the score go to the larger magnitude, ties of both to the lower index.
    """
    size = score.shape[1]
    if keep == 0:
        return score.new_zeros(score.shape).bool()
    if size <= FEW:
        kept = _fewer_are_larger(score, keep)
    else:
        kept = score >= score.kthvalue(size - keep + 1, dim=1, keepdim=True).values
    tied = (kept.sum(1) != keep).nonzero().squeeze(1)
    if len(tied):  # only where equal scores straddle the threshold is a full order needed
        by_magnitude = magnitude[tied].argsort(dim=1, descending=True, stable=True)
        by_score = score[tied].gather(1, by_magnitude).argsort(dim=1, descending=True, stable=True)
        winners = by_magnitude.gather(1, by_score[:, :keep])
        kept[tied] = kept.new_zeros(len(tied), size).scatter_(1, winners, True)
    return kept


def _fewer_are_larger(score: Tensor, than: int) -> Tensor:
    """Where fewer than `than` of the row are larger: compares all pairs, a column at a time."""
    import torch

    columns = score.T.contiguous()
    larger = columns.new_zeros(columns.shape, dtype=torch.int8)
    for first in range(len(columns)):
        for second in range(first):
            larger[first] += columns[second] > columns[first]
            larger[second] += columns[first] > columns[second]
    return (larger < than).T.contiguous()
