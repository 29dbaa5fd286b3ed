"""The proximal operator of 2:4 against a search over all weights of single groups."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from gblm_compress.methods.proximal import proximal, regulariser


def cost(w: np.ndarray, z: np.ndarray, strength: float) -> np.ndarray:
    """The objective as the paper writes it, of points [..., 4]."""
    triples = sum(np.abs(w[..., i] * w[..., j] * w[..., k]) for i, j, k in combinations(range(4), 3))
    return ((w - z) ** 2).sum(-1) / 2 + strength * triples


def least(z: np.ndarray, strength: float) -> float:
    """The least cost, by a grid over all points between zero and `z` that is made finer around the best three."""
    axes = [np.linspace(0, value, 17) for value in z]
    points = np.array(list(product(*axes)))
    steps = np.abs(z) / 16
    best = np.inf
    for start in points[cost(points, z, strength).argsort()[:3]]:
        point, step = start, steps
        for _ in range(40):
            near = point + np.array(list(product((-1, -0.5, 0, 0.5, 1), repeat=4))) * step
            near = near[cost(near, z, strength).argmin()]
            step = step if (near != point).any() else step / 2
            point = near
        best = min(best, float(cost(point, z, strength)))
    return best


@pytest.mark.parametrize("strength", [0.01, 0.2, 0.5, 2.0])
def test_nothing_costs_less(strength) -> None:
    weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = proximal(weight, strength)
    for row in range(len(weight)):
        z = weight[row].numpy()
        assert float(cost(got[row].numpy(), z, strength)) <= least(z, strength) + 1e-5, row
    zeros = (got == 0).sum(1)
    assert zeros.max() <= 2 and bool((zeros == 2).any()) == (strength > 0.3)
    assert (got.sign() * weight.sign() >= 0).all() and (got.abs() <= weight.abs()).all()


def test_two_of_four_stay_as_they_are() -> None:
    weight = torch.tensor([[0.5, 0.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]])
    assert regulariser(weight).tolist() == [0.0, 0.0, 4.0]
    assert torch.equal(proximal(weight, 0.3)[:2], weight[:2])
    assert torch.equal(proximal(weight, 0.0), weight)
    assert torch.equal(proximal(weight, 100.0)[2], torch.tensor([1.0, -1.0, 0.0, 0.0]))
