"""Orders of channels: against all orders of a few channels, and what one round deals out against all ways to deal."""

from itertools import permutations

import pytest
import torch

from gblm_compress.methods import channel_order
from gblm_compress.methods.channel_order import lost, reordered


def worth_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 4


def slowly_lost(worth: torch.Tensor, order: list[int], n: int, m: int) -> float:
    """The sum of all but the N largest of each group, weight by weight."""
    total = 0.0
    for row in worth.double().tolist():
        for first in range(0, len(order), m):
            total += sum(sorted(row[channel] for channel in order[first : first + m])[: m - n])
    return total / float(worth.double().sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 3)])
def test_what_is_lost(n, m) -> None:
    worth, order = worth_of(5, 12, 0), [7, 3, 11, 0, 1, 2, 9, 8, 4, 5, 6, 10]
    assert lost(worth, torch.tensor(order), n, m) == pytest.approx(slowly_lost(worth, order, n, m), abs=1e-6)
    assert lost(torch.zeros(2, 12), torch.tensor(order), n, m) == 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)])
def test_of_few_channels_the_best_order_is_found(n, m, seed) -> None:
    worth = worth_of(3, 2 * m, seed)
    best = min(slowly_lost(worth, list(order), n, m) for order in permutations(range(2 * m)))
    found = reordered(worth, n, m, 40, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == list(range(2 * m))
    assert slowly_lost(worth, found.tolist(), n, m) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 4)])
def test_a_round_deals_in_the_best_way(n, m) -> None:
    groups = 4
    worth, grid = worth_of(6, groups * m, 1), torch.randperm(groups * m).view(groups, m)
    places = torch.randint(m, (groups,))
    ways = []
    for way in permutations(range(groups)):
        dealt = grid.clone()
        for group, giver in enumerate(way):
            dealt[group, places[group]] = grid[giver, places[giver]]
        ways.append(slowly_lost(worth, dealt.flatten().tolist(), n, m))
    found = channel_order._dealt(worth, grid, places, n)
    assert slowly_lost(worth, found.flatten().tolist(), n, m) == pytest.approx(min(ways), abs=1e-6)


def test_more_rounds_are_never_worse_and_draws_are_repeated(monkeypatch) -> None:
    worth, before = worth_of(8, 64, 2), 1.0
    for rounds in (1, 2, 4, 8, 16):
        order = reordered(worth, 2, 4, rounds, torch.Generator().manual_seed(3))
        assert lost(worth, order, 2, 4) <= before + 1e-6
        before = lost(worth, order, 2, 4)
    assert before < 0.9 * lost(worth, torch.arange(64), 2, 4)
    assert torch.equal(order, reordered(worth, 2, 4, 16, torch.Generator().manual_seed(3)))
    monkeypatch.setattr(channel_order, "AT_ONCE", 5)  # a few groups at a time, and rows in pieces
    monkeypatch.setattr(channel_order, "_ELEMENTS", 60)
    in_parts = reordered(worth, 2, 4, 16, torch.Generator().manual_seed(3))
    assert sorted(in_parts.tolist()) == list(range(64))
    assert lost(worth, in_parts, 2, 4) < 0.95 * lost(worth, torch.arange(64), 2, 4)
