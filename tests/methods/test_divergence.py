"""The divergence of predictions against torch's, and finite differences."""

import pytest
import torch
from torch.nn.functional import kl_div

from gblm_compress.methods import divergence
from gblm_compress.methods.divergence import kl_divergence


def _pair(rows: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, dense = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.to(dtype), dense.to(dtype)


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
    exact, own, dense = (x.requires_grad_() for x in (logits.double(), logits.clone(), dense))
    expected = kl_div(
        exact.log_softmax(-1), dense.detach().double().log_softmax(-1), reduction="batchmean", log_target=True
    )
    expected.backward()
    found = kl_divergence(own, dense)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert own.grad.dtype == dtype and dense.grad is None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
