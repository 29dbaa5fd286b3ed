"""The dense model's predictions, and the loss towards them, whatever stands behind the head."""

import pytest
import torch

from gblm_compress.calibration.weights import StatePool
from gblm_compress.training.imitation import Imitation, Teacher
from tests.conftest import CAUSAL_LM, samples, tiny_model
from tests.families.tiny import tiny_family


@pytest.mark.parametrize("budget", [1 << 20, 0])
def test_windows_are_asked_once(budget: int, tmp_path) -> None:
    model, windows = tiny_model("llama"), samples(3, 20)
    with torch.no_grad():
        expected = torch.cat([model.model(**sample, use_cache=False).last_hidden_state for sample in windows])
    ran: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True)
    pool = StatePool(tmp_path, budget, torch.device("cpu"))
    teacher = Teacher(model, CAUSAL_LM, [*windows, *windows], range(3), "float32", pool)
    torch.testing.assert_close(teacher.predictions([0, 2]), expected[[0, 2]])
    torch.testing.assert_close(teacher.predictions([2, 1]), expected[[2, 1]])  # one of them is new
    torch.testing.assert_close(teacher.predictions([1, 0, 2]), expected[[1, 0, 2]])
    assert ran == [40, 40]


AFTER_THE_HEAD = {
    "llama": {}, "gemma2": {"final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_the_divergence_is_that_of_predictions_whatever_comes_after_the_head(family: str) -> None:
    dense, pruned = (tiny_family(family, **AFTER_THE_HEAD[family]) for _ in range(2))
    for parameter in pruned.model.layers.parameters():
        parameter.data *= parameter.abs() > 0.1
    windows = samples(3)
    expected = []
    for sample in windows:
        with torch.no_grad():
            p, q = (model(**sample).logits[0, :-1].double().log_softmax(-1) for model in (dense, pruned))
        expected.append(float((p.exp() * (p - q)).sum(-1).mean()))
    teacher = Teacher(dense, CAUSAL_LM, windows, range(3), "float32", None)
    loss = Imitation(pruned, CAUSAL_LM, windows, teacher.predictions, "float32")
    assert float(loss([0, 2]).detach()) == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-4)
    assert min(expected) > 0.01
    loss([1]).backward()
    assert all(p.grad is not None for name, p in pruned.named_parameters() if "layers" in name)
