"""Refinement of a mask: exchanges of single weights that lower the layer's reconstruction error.

All take the dense weight W [out_features, in_features] in float32, a mask of its shape that satisfies the pattern
(True = keep), the layer's `Statistics` and the pattern, and return a mask that satisfies it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gblm_compress.methods.choices import Choice, Need, Statistics
from gblm_compress.methods.gram import reconstruction_error
from gblm_compress.methods.patterns import Pattern

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 16
"""At most so many weights of each side of a group are offered for exchange: of an N:M group with M <= 16, all."""

WEIGHTS_AT_ONCE = 2**20
"""Rows are independent; so many weights' rows are worked on at a time, which bounds the memory for the pairs."""


def none(weight: Tensor, keep: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
    """The very mask that is given."""
    return keep


def swap(weight: Tensor, keep: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
    """1-swaps until none helps (SparseSwaps, arXiv 2512.10922): a kept weight goes, a pruned one of its group returns.

    With d the pruned part of a row w, and no update of the survivors, the error is dᵀHd. To prune p and revive q
    changes it by

        2·w_p·(Hd)_p + w_p²·H_pp − 2·w_q·(Hd)_q + w_q²·H_qq − 2·w_p·w_q·H_pq.

    In every round each row makes the best exchange that it finds among its groups' most promising candidates, if it
    lowers the error; the number of weights in a group never changes.

    Returns:
        The new mask; no row's error is larger than before.
    """
    import torch

    gram = statistics.moments()
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    if pattern.n_m is not None:
        kept, group = pattern.n_m
        outs, backs = min(CANDIDATES, kept), min(CANDIDATES, group - kept)
    else:
        group = weight.shape[1]
        outs = backs = min(CANDIDATES, group)
    parts = zip(torch.split(weight, rows), torch.split(keep, rows), strict=True)
    return torch.cat([_swap(w, mask.clone(), gram, group, outs, backs) for w, mask in parts])


def _swap(weight: Tensor, keep: Tensor, gram: Tensor, group: int, outs: int, backs: int) -> Tensor:
    """Args:
    group: columns of a group.
    outs, backs: how many kept and how many pruned weights of a group are candidates.
    """
    import torch

    rows, columns = weight.shape
    diagonal = gram.diagonal()
    gradient = (weight * ~keep) @ gram  # Hd of every row, kept up to date
    floor = 1e-6 * reconstruction_error(weight, gram)  # a gain below the rounding of the error is none
    active = torch.arange(rows, device=weight.device)
    for _ in range(columns):  # an end, should rounding make a row go round in circles
        w, kept, slope = weight[active], keep[active], gradient[active]
        own = w.square() * diagonal
        cost = torch.where(kept, own + 2 * w * slope, torch.inf).reshape(-1, group)
        gain = torch.where(kept, torch.inf, own - 2 * w * slope).reshape(-1, group)
        cost, p = cost.topk(outs, dim=1, largest=False)
        gain, q = gain.topk(backs, dim=1, largest=False)
        offset = (torch.arange(len(p), device=p.device) % (columns // group) * group).unsqueeze(1)
        p, q = (p + offset).reshape(len(active), -1, outs), (q + offset).reshape(len(active), -1, backs)
        w_p = w.gather(1, p.flatten(1)).reshape(p.shape)
        w_q = w.gather(1, q.flatten(1)).reshape(q.shape)
        change = cost.reshape(p.shape).unsqueeze(3) + gain.reshape(q.shape).unsqueeze(2)
        change -= 2 * w_p.unsqueeze(3) * w_q.unsqueeze(2) * gram[p.unsqueeze(3), q.unsqueeze(2)]
        best, where = change.flatten(1).min(1)
        better = best < -floor[active]
        if not better.any():
            break
        where = where[better]
        active = active[better]
        out = p.flatten(1)[better].gather(1, (where // backs).unsqueeze(1)).squeeze(1)
        back_index = where // (outs * backs) * backs + where % backs
        back = q.flatten(1)[better].gather(1, back_index.unsqueeze(1)).squeeze(1)
        keep[active, out] = False
        keep[active, back] = True
        gradient[active] += (
            weight[active, out].unsqueeze(1) * gram[out] - weight[active, back].unsqueeze(1) * gram[back]
        )
    return keep


@dataclass(frozen=True)
class Refinement(Choice):
    """An entry of `REFINEMENTS`.

    Attributes:
        refine: of (W, mask, statistics of the layer, pattern).
    """

    refine: Callable[[Tensor, Tensor, Statistics, Pattern], Tensor]


REFINEMENTS: dict[str, Refinement] = {
    "none": Refinement(none, help="the mask stays as it is"),
    "swap": Refinement(
        swap, help="exchange weights of a mask while that lowers the error", needs=Need.GRAM, reads=("guidance",)
    ),
}
