"""The proximal operator that draws weights to the 2:4 pattern (ProxSparse, arXiv 2502.00258). Pure functions."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SWEEPS = 50
"""Passes over the coordinates, at most; far fewer are needed where the strength is small beside the weights."""

CLOSE = 1e-6
"""A pass that moves no weight by more than this share of the largest is the last."""


def regulariser(weight: Tensor) -> Tensor:
    """Σ |w_i·w_j·w_k| over the four triples of every group: zero where at most two weights are not.

    Args:
        weight: [groups, 4].

    Returns:
        [groups].
    """
    columns = weight.abs().unbind(1)
    return sum((first * second * third for first, second, third in combinations(columns, 3)), start=columns[0] * 0)


def proximal(weight: Tensor, strength: float) -> Tensor:
    """argmin over w of ½‖w − weight‖² + strength · regulariser(w), for every group of four.

    Signs and the order of magnitudes stay. Of the sorted magnitudes z either the largest two survive as they are, or
    three or four are positive, each being max(0, z_i − strength · Σ w_j·w_k over pairs of the others): this is solved
    coordinate by coordinate. The best of the three candidates is taken.

    Args:
        weight: [groups, 4].
        strength: of the regulariser, not negative, in units of 1 / weight.

    Returns:
        [groups, 4].
    """
    import torch

    sizes, order = weight.abs().sort(dim=1, descending=True, stable=True)
    candidates = [_positive(sizes, count, strength) for count in (2, 3, 4)]
    costs = torch.stack([(one - sizes).square().sum(1) / 2 + strength * regulariser(one) for one in candidates])
    best = torch.stack(candidates).gather(0, costs.argmin(0)[None, :, None].expand(1, -1, 4))[0]
    return torch.zeros_like(weight).scatter_(1, order, best) * weight.sign()


def _positive(sizes: Tensor, count: int, strength: float) -> Tensor:
    """The candidate [groups, 4] of which at most the first `count` are positive, by coordinate descent."""
    import torch

    columns = [column if place < count else column * 0 for place, column in enumerate(sizes.unbind(1))]
    for _ in range(SWEEPS):
        moved = []
        for place in range(count):
            others = [columns[other] for other in range(count) if other != place]
            pull = sum((one * other for one, other in combinations(others, 2)), start=others[0] * 0)
            new = (sizes[:, place] - strength * pull).clamp_min(0)
            moved.append((new - columns[place]).abs().amax())
            columns[place] = new
        if max(map(float, moved)) <= CLOSE * float(sizes.amax()):
            break
    return torch.stack(columns, dim=1)
