"""How much each layer keeps: the formulas against slow ones, and the sum that must not grow."""

from unittest.mock import patch

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from gblm_compress.methods import allocation
from gblm_compress.methods.allocation import Budget, DenseLayer, by_sensitivity, spread
from gblm_compress.methods.choices import Statistics
from gblm_compress.methods.patterns import Pattern


def ranked(scores: dict[str, torch.Tensor], density: float) -> dict[str, float]:
    """What layers keep whose weights and gradients have these products, each in a block of its own."""
    layers = []
    for name, score in scores.items():
        weight = torch.linspace(-10, -0.1, score.numel()).view_as(score)
        layers.append(DenseLayer(name, weight, Statistics(gradient_norm=score / weight.abs())))
    return by_sensitivity([[layer] for layer in layers], density)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_global_ranking_is_one_sort_of_all_weights(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {str(scale): scale * torch.rand(40, 50, generator=generator) for scale in (1.0, 1e-3, 2.0)}
    everything = sorted(torch.cat([score.flatten() for score in scores.values()]).tolist(), reverse=True)
    threshold = everything[int(density * len(everything)) - 1]
    kept = ranked(scores, density)
    for name, score in scores.items():
        assert kept[name] == pytest.approx(float((score >= threshold).double().mean()), abs=0.01)
    assert sum(kept.values()) / 3 == pytest.approx(density, abs=1e-6)


def test_global_ranking_of_zeros() -> None:
    scores = {"dead": torch.zeros(10, 10), "alive": torch.ones(10, 10)}
    assert ranked(scores, 0.5) == {"dead": pytest.approx(0.0), "alive": pytest.approx(1.0)}


@hypothesis.given(
    budget=st.sampled_from(
        [("unstructured", 0.5), ("unstructured", 0.995), ("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("8:16", 0.5)]
    ),
    layers=st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12),
    deviation=st.floats(0.01, 0.5),
)
def test_spread_keeps_the_sum_and_the_limits(budget, layers, deviation: float) -> None:
    pattern, sparsity = Pattern(budget[0]), budget[1]
    sizes = {str(i): 1000 * size for i, (size, _) in enumerate(layers)}
    with patch.object(allocation, "DEVIATION", deviation):
        after = spread(Budget(pattern, sparsity), sizes, {str(i): density for i, (_, density) in enumerate(layers)})
    wanted = (1 - sparsity) * sum(sizes.values())
    kept = sum((1 - after[name].sparsity) * sizes[name] for name in after)
    assert kept <= wanted * (1 + 1e-6)
    if pattern.n_m is None:
        assert kept == pytest.approx(wanted, rel=1e-4)
        assert all(abs(b.sparsity - sparsity) <= deviation + 1e-9 for b in after.values())
    else:
        step = 1 / pattern.n_m[1]
        assert kept > wanted * (1 - 1e-6) - step * max(sizes.values())
        assert all(abs(b.sparsity - sparsity) < deviation + step for b in after.values())


@pytest.mark.parametrize(
    ("deviation", "wanted", "given"),
    [
        # In layers of equal size they sum to 6 of 4: rounded down 1, 2, 2, and the one left to 2.6.
        (0.4, (1.3 / 4, 2.6 / 4, 2.1 / 4), ["1:4", "3:4", "2:4"]),
        (allocation.DEVIATION, (0.0, 0.5, 1.0), ["1:4", "2:4", "3:4"]),  # the usual one moves 2:4 by one
    ],
)
def test_whole_groups_by_hand(deviation, wanted, given, monkeypatch) -> None:
    monkeypatch.setattr(allocation, "DEVIATION", deviation)
    densities = dict(enumerate(wanted))
    after = spread(Budget(Pattern("2:4"), 0.5), dict.fromkeys(densities, 100), densities)
    assert [b.pattern.name for b in after.values()] == given
