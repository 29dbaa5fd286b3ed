"""The dense model's predictions, and the loss towards them, whatever stands behind the head."""

import pytest
import torch
import transformers

from gblm_compress.calibration.weights import StatePool
from gblm_compress.models.tiny import VOCABULARY, tiny_model
from gblm_compress.training.imitation import Imitation, Teacher
from tests.conftest import CAUSAL_LM, samples
from tests.tasks.test_tasks import PaddedLM, padded_samples

TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip


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


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**TINY),
        transformers.Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=2.0),
        transformers.GraniteConfig(**TINY, logits_scaling=4.0),
        transformers.CohereConfig(**TINY, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_the_divergence_is_that_of_predictions_whatever_comes_after_the_head(config, progress) -> None:
    torch.manual_seed(0)
    dense, pruned = (transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
    pruned.get_output_embeddings().load_state_dict(dense.get_output_embeddings().state_dict())
    windows = samples(3)
    expected = []
    for sample in windows:
        with torch.no_grad():
            p, q = (model(**sample).logits[0, :-1].double().log_softmax(-1) for model in (dense, pruned))
        expected.append(float((p.exp() * (p - q)).sum(-1).mean()))
    teacher = Teacher(dense, CAUSAL_LM, windows, range(3), "float32", None)
    loss = Imitation(pruned, CAUSAL_LM, windows, teacher.predictions, "float32")
    assert float(loss([0, 2]).detach()) == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-4)
    loss([1]).backward()
    assert all(p.grad is not None for name, p in pruned.named_parameters() if "layers" in name)


def test_padding_is_left_out() -> None:
    dense, pruned, found = tiny_model("llama"), tiny_model("llama"), []
    for parameter in pruned.model.layers.parameters():
        parameter.data *= parameter.abs() > 0.05
    for task, given in ((CAUSAL_LM, samples(3, 16)), (PaddedLM(), padded_samples(3, 16))):
        loss = Imitation(pruned, task, given, Teacher(dense, task, given, [0], "float32", None).predictions, "float32")
        found.append(float(loss([0]).detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 1e-3
