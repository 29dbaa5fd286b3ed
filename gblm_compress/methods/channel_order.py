"""In which order the input channels of a layer lie: N:M prunes every M neighbours alone, so that the order decides what
is lost.

An order is worth as much as the weights that N:M leaves of it. It is found by rounds of an assignment problem, as
channel permutations are in "Plug-and-Play" (Zhang et al., ICLR 2024), from the order that there is: every group gives
one of its channels away, and all of these are dealt out anew, one to each group, in the best way that there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

AT_ONCE = 512
"""Groups that change channels with each other in a round, so that a round takes time in proportion to the width."""

_ELEMENTS = 1 << 24
"""Numbers in the largest tensor of a round."""


def lost(worth: Tensor, order: Tensor, n: int, m: int) -> float:
    """The share of the worth that N:M takes away, where it leaves the N largest of each group.

    Args:
        worth: of the weights, not negative, [out_features, in_features].
        order: [in_features], the channel that lies at each place.
    """
    groups = worth[:, order].reshape(len(worth), -1, m)
    total = float(groups.sum())
    return 1 - float(groups.topk(n, dim=-1).values.sum()) / total if total else 0.0


def reordered(worth: Tensor, n: int, m: int, rounds: int, generator: Generator) -> Tensor:
    """An order in which N:M takes less away.

    Args:
        worth: as for `lost`, in float32; in_features is a multiple of M.
        rounds: how often channels are dealt out.
        generator: on the CPU; it says which channel each group gives away, and which groups change with each other.

    Returns:
        [in_features], the channel to lie at each place; never worse than the order that there is.
    """
    import torch

    columns = worth.shape[1]
    grid = torch.arange(columns).view(-1, m)
    for _ in range(rounds):
        places = torch.randint(m, (len(grid),), generator=generator)
        for some in torch.split(torch.randperm(len(grid), generator=generator), AT_ONCE):
            grid[some] = _dealt(worth, grid[some], places[some], n)
    return grid.flatten()


def _dealt(worth: Tensor, grid: Tensor, places: Tensor, n: int) -> Tensor:
    """The groups with the channels at the given places dealt out anew.

    With t the N-th largest of what stays in a group and d the channel that comes, the N largest of both are worth
    max(t, d) beside what stays whatever comes.

    Args:
        grid: [groups, M], channels.
        places: [groups], which of each is given away.
    """
    import torch
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    groups = len(grid)
    stays = torch.ones_like(grid, dtype=torch.bool).scatter_(1, places[:, None], False)
    given = grid.gather(1, places[:, None]).squeeze(1)
    rest = grid[stays].view(groups, -1)
    gain = torch.zeros(groups, groups, dtype=torch.float64, device=worth.device)
    for rows in torch.split(worth, max(1, _ELEMENTS // groups**2)):
        comes, least = rows[:, given], rows[:, rest].topk(n, dim=-1).values[..., -1]
        gain += torch.maximum(comes[:, :, None], least[:, None, :]).sum(0)
    _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    dealt = grid.clone()
    taker = torch.from_numpy(chosen)
    dealt[taker, places[taker]] = given
    return dealt
