"""Optimisers: moments in 8 bits against Adam with exact ones, what a checkpoint keeps, and how many bytes they take."""

import pytest
import torch

from gblm_compress.errors import UsageError
from gblm_compress.methods.optimisers import OPTIMISERS

BETAS = (0.9, 0.95)
SIZE = 8_192  # enough for moments in 8 bits


def trained(name: str, steps: int, *, broken_at: int | None = None) -> tuple[torch.Tensor, list[torch.Tensor], object]:
    """A long and a short tensor after some steps whose gradients vary tenfold, the moments of the long one, and
    the optimiser.

    Args:
        broken_at: the step after which another optimiser goes on with what was kept.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator).requires_grad_() for size in (SIZE, 10)]
    scales = 10 ** (torch.rand(SIZE, generator=generator))
    optimiser = OPTIMISERS[name]
    groups = [{"params": [tensor], "lr": 0.01} for tensor in tensors]
    adam = optimiser.build(groups, BETAS)
    for step in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(len(tensor), generator=generator) + 1
            tensor.grad *= scales[: len(tensor)]
        adam.step()
        if step == broken_at:
            states = [optimiser.state(adam, tensor) for tensor in tensors]
            adam = optimiser.build([{"params": [tensor], "lr": 0.01} for tensor in tensors], BETAS)
            for tensor, state in zip(tensors, states, strict=True):
                optimiser.restore(adam, tensor, {part: one.clone() for part, one in state.items()})
    return torch.cat([tensor.detach() for tensor in tensors]), [optimiser.power(adam, one) for one in tensors], adam


def test_the_first_step_is_adams_and_later_ones_are_near() -> None:
    for steps, most in ((1, 1e-6), (30, 0.05)):
        exact, _, _ = trained("adam", steps)
        eight, _, _ = trained("adam-8bit", steps)
        start, _, _ = trained("adam", 0)
        gap = (eight - exact).norm() / (exact - start).norm()
        assert gap < most, steps
        assert torch.allclose(eight[SIZE:], exact[SIZE:], atol=1e-6)  # few numbers: moments of 32 bits
    assert gap > 1e-4  # they are of 8 bits


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_is_kept_goes_on_to_the_same_bits(name: str) -> None:
    whole, moments, _ = trained(name, 6)
    again, others, _ = trained(name, 6, broken_at=2)
    assert torch.equal(whole, again)
    for one, other in zip(moments, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "error"), [("adam", 1e-6), ("adam-8bit", 0.05)])
def test_the_second_moment_is_the_decayed_mean_of_squares(name: str, error: float) -> None:
    tensor = torch.zeros(SIZE).requires_grad_()
    adam = OPTIMISERS[name].build([{"params": [tensor], "lr": 0.01}], BETAS)
    assert torch.equal(OPTIMISERS[name].power(adam, tensor), torch.zeros(SIZE))
    assert OPTIMISERS[name].state(adam, tensor) == {}
    expected, generator = torch.zeros(SIZE), torch.Generator().manual_seed(0)
    for _ in range(5):
        tensor.grad = torch.randn(SIZE, generator=generator)
        expected = BETAS[1] * expected + (1 - BETAS[1]) * tensor.grad.square()
        adam.step()
    found = OPTIMISERS[name].power(adam, tensor)
    assert found.dtype == torch.float32 and found.shape == tensor.shape
    assert (found - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_moments_take_the_bytes_that_are_stated(name: str) -> None:
    _, _, adam = trained(name, 1)
    state = adam.state[adam.param_groups[0]["params"][0]]
    tables = ("step", "qmap1", "qmap2")  # one number, and the values of levels, which all tensors share
    assert sum(one.nbytes for part, one in state.items() if part not in tables) == SIZE * OPTIMISERS[name].moment_bytes


def test_a_package_that_is_missing_is_told(monkeypatch) -> None:
    for optimiser in OPTIMISERS.values():
        optimiser.check()
    monkeypatch.setattr("gblm_compress.methods.optimisers.find_spec", lambda name: None)
    OPTIMISERS["adam"].check()
    with pytest.raises(UsageError, match=r"pip install 'gblm-compress\[adam-8bit\]'"):
        OPTIMISERS["adam-8bit"].check()
