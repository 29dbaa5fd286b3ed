"""Metrics against plain loops."""

import math

import pytest
import torch

from gblm_compress.tasks.metrics import Metric, mean_kl, mean_metric, perplexity, spearman, top1_agreement


def test_kl_and_agreement_against_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    reference, logits = (torch.randn(5, 11, generator=generator) for _ in range(2))
    total = agree = 0.0
    for p, q in zip(reference.double().softmax(-1).tolist(), logits.double().softmax(-1).tolist(), strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        agree += max(range(11), key=p.__getitem__) == max(range(11), key=q.__getitem__)
    assert mean_kl(reference, logits) == pytest.approx(total / 5, rel=1e-5)
    assert top1_agreement(reference, logits) == pytest.approx(agree / 5)


def test_standard_error() -> None:
    assert mean_metric([2.0]) == Metric(2.0)
    found = mean_metric([1.0, 2.0, 6.0])
    assert found.value == 3.0 and found.error == pytest.approx(math.sqrt(7 / 3))


def test_rank_correlation_with_ties() -> None:
    expected = torch.corrcoef(torch.tensor([[1, 2.5, 2.5, 4, 5], [2, 1, 3, 5, 4.0]]))[0, 1]
    assert spearman([0.1, 0.2, 0.2, 3.0, 9.0], [2, 1, 3, 5, 4]).value == pytest.approx(float(expected))


def test_the_error_of_perplexity_follows_the_slope_of_exp() -> None:
    found = perplexity(Metric(3.0, 0.001))
    assert found.value == pytest.approx(math.exp(3))
    assert found.error == pytest.approx((math.exp(3.001) - math.exp(2.999)) / 2, rel=1e-4)
    assert perplexity(Metric(1e4)) == Metric(math.inf)
