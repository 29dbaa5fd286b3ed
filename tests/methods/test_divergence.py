"""The divergence of predictions against plain loops and autograd."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from gblm_compress.methods import divergence
from gblm_compress.methods.divergence import kl_divergence


def _pair(rows: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, dense = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.to(dtype), dense.to(dtype)


def test_it_is_the_mean_over_rows_of_the_sum_of_p_times_log_p_over_q() -> None:
    logits, dense = _pair(3, 5)
    total = 0.0
    for own, theirs in zip(logits.tolist(), dense.tolist(), strict=True):
        all_own, all_theirs = (sum(map(math.exp, row)) for row in (own, theirs))
        for q, p in zip(own, theirs, strict=True):
            share = math.exp(p) / all_theirs
            total += share * (math.log(share) - math.log(math.exp(q) / all_own))
    assert float(kl_divergence(logits, dense)) == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("at_once", [1, 35, 10**9])
def test_the_gradient_is_that_of_finite_differences_however_many_rows_are_worked_on_at_once(
    at_once: int, monkeypatch
) -> None:
    monkeypatch.setattr(divergence, "ELEMENTS", at_once)
    logits, dense = _pair(7, 5)
    assert torch.autograd.gradcheck(lambda own: 3 * kl_divergence(own, dense), (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_in_another_dtype_is_that_of_the_same_numbers_in_float64(dtype: torch.dtype) -> None:
    logits, dense = _pair(9, 40, dtype)
    exact, own = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected = kl_div(exact.log_softmax(-1), dense.double().log_softmax(-1), reduction="batchmean", log_target=True)
    expected.backward()
    found = kl_divergence(own, dense)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert own.grad is not None and exact.grad is not None and own.grad.dtype == dtype
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_dense_prediction_has_no_gradient() -> None:
    logits, dense = (one.requires_grad_() for one in _pair(2, 4))
    kl_divergence(logits, dense).backward()
    assert logits.grad is not None and dense.grad is None
