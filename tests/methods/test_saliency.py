"""Every score against a loop over single weights; obs has none, its masks are tested in test_fits.py."""

import pytest
import torch

from gblm_compress.errors import ModelError
from gblm_compress.methods import saliency
from gblm_compress.methods.choices import Statistics
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.saliency import METHODS, Rule

SLOW = {
    "magnitude": lambda w, a, g, alpha: abs(w),
    "gradient": lambda w, a, g, alpha: abs(w) * g,
    "wanda": lambda w, a, g, alpha: abs(w) * a,
    "gblm": lambda w, a, g, alpha: abs(w) * (a + alpha * g),
    "regional": lambda w, a, g, alpha: abs(w) * (a + alpha * g),
}


@pytest.mark.parametrize("name", SLOW)
def test_the_highest_scores_survive_by_the_formula_weight_by_weight(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, activation = torch.randn(5, 8, generator=generator), torch.rand(8, generator=generator)
    gradient = torch.rand(5, 8, generator=generator)
    statistics = Statistics(activation, gradient, gradient)
    score = getattr(saliency, name)(weight, statistics, 100.0)
    for i in range(5):
        for j in range(8):
            expected = SLOW[name](float(weight[i, j]), float(activation[j]), float(gradient[i, j]), 100.0)
            assert float(score[i, j]) == pytest.approx(expected, rel=1e-5)
    rule = Rule("layer", Pattern("2:4"), 0.5, 100.0)
    selection = METHODS[name].select(weight, statistics, rule)
    assert torch.equal(selection.keep, Pattern("2:4").mask(score, weight, 0.5)) and not selection.fitted
    infinite = Statistics(activation * torch.inf, gradient * torch.inf, gradient * torch.inf)
    with pytest.raises(ModelError, match="layer: 40 of 40 scores are NaN or infinite"):
        METHODS[name].select(weight * torch.inf, infinite, rule)


def test_a_score_has_the_shape_of_the_weight() -> None:
    select = saliency.by_score(lambda weight, statistics, alpha: statistics.activations())
    with pytest.raises(ValueError, match=r"the weight's shape \[5, 8\], not \[8\]"):
        select(torch.ones(5, 8), Statistics(torch.ones(8)), Rule("layer", Pattern("2:4"), 0.5, 100.0))
