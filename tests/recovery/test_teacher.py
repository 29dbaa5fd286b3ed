"""What the dense model says of windows: its own logits, whether it runs or its head's inputs were kept."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gblm_compress.calibration.weights import StatePool
from gblm_compress.models.tiny import VOCABULARY, tiny_model
from gblm_compress.recovery.teacher import Teacher
from tests.conftest import CAUSAL_LM, samples


def with_capped_logits() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(final_logit_softcapping=0.01, attn_implementation="eager", **sizes)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("budget", [1 << 20, 0])
@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), with_capped_logits])
def test_logits_are_the_models_own_at_first_and_again(make, budget: int, tmp_path) -> None:
    model, windows = make(), samples(3, 20)
    with torch.no_grad():
        expected = torch.cat([model(**sample, use_cache=False).logits for sample in windows])
    ran: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True)
    pool = StatePool(tmp_path, budget, torch.device("cpu"))
    teacher = Teacher(model, CAUSAL_LM, [*windows, *windows], range(3), "float32", pool, states=False)
    torch.testing.assert_close(teacher.of([0, 2])[0], expected[[0, 2]])
    torch.testing.assert_close(teacher.of([2, 1])[0], expected[[2, 1]])  # one of them is new
    torch.testing.assert_close(teacher.of([1, 0, 2])[0], expected[[1, 0, 2]])
    assert ran == [40, 40, 1]


def test_hidden_states_are_those_behind_every_block() -> None:
    model, windows = tiny_model("llama"), samples(2, 20)
    teacher = Teacher(model, CAUSAL_LM, windows, [], "float32", None, states=True)
    with torch.no_grad():
        expected = model(torch.cat([each["input_ids"] for each in windows]), output_hidden_states=True, use_cache=False)
    logits, states = teacher.of([0, 1])
    torch.testing.assert_close(logits, expected.logits)
    assert len(states) == len(expected.hidden_states) - 1
    for one, other in zip(states, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(one, other)
