"""Every score against a loop over single weights; obs has none, its masks are tested in test_updates.py."""

import pytest
import torch

from gblm_compress.methods.saliency import SALIENCIES, Statistics

SLOW = {
    "magnitude": lambda w, a, g, alpha: abs(w),
    "gradient": lambda w, a, g, alpha: abs(w) * g,
    "wanda": lambda w, a, g, alpha: abs(w) * a,
    "gblm": lambda w, a, g, alpha: abs(w) * (a + alpha * g),
    "regional": lambda w, a, g, alpha: abs(w) * (a + alpha * g),
}


@pytest.mark.parametrize("name", SLOW)
def test_score_is_the_formula_weight_by_weight(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 7, generator=generator)
    activation = torch.rand(7, generator=generator)
    gradient = torch.rand(5, 7, generator=generator)
    score = SALIENCIES[name].score(weight, Statistics(activation, gradient, gradient), 100.0)
    for i in range(5):
        for j in range(7):
            expected = SLOW[name](float(weight[i, j]), float(activation[j]), float(gradient[i, j]), 100.0)
            assert float(score[i, j]) == pytest.approx(expected, rel=1e-5)


def test_declared_needs_are_what_is_read() -> None:
    weight = torch.randn(3, 4)
    full = Statistics(torch.rand(4), torch.rand(3, 4), torch.rand(3, 4))
    for saliency in (SALIENCIES[name] for name in SLOW):
        given = Statistics(
            full.activation_norm if saliency.needs_activations else None,
            full.gradient_norm if saliency.needs_gradients else None,
            full.regional_norm if saliency.needs_regional else None,
        )
        assert torch.equal(saliency.score(weight, given, 2.0), saliency.score(weight, full, 2.0))
