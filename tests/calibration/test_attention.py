"""Chunked attention against torch's own, and when it is left to torch."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gblm_compress.calibration import attention as module
from gblm_compress.calibration.attention import attention, chunked_attention
from tests.conftest import ARCHITECTURES, samples, tiny_model

LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=3)


def heads(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((1, 6, length, 16), (1, 2, length, 16), (1, 2, length, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture
def exact(monkeypatch) -> None:
    """Chunks in float32, where nothing but the order of the sums differs from torch's kernel."""
    monkeypatch.setattr(module, "in_bfloat16", lambda query: True)
    monkeypatch.setattr(module, "LARGEST", float("inf"))


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ·scale)V over the past, in float64; heads of queries share those of keys and values."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    past = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scores = (query @ key.mT * scale).masked_fill(~past, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("length", "new"), [(2, 2), (7, 7), (128, 128), (130, 130), (300, 300), (150, 1)])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_is_causal_attention_and_so_are_its_gradients(length, new, samples, scale, exact, monkeypatch) -> None:
    """Of one new token, the others are in the cache."""
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *a, **k: pytest.fail("left to torch"))
    inputs = [torch.cat([x + number for number in range(samples)]) for x in heads(length)]
    query, key, value = inputs
    got = attention(LAYER, query[:, :, -new:], key, value, None, scaling=scale)[0]
    expected = by_definition(*inputs, scale or 0.25)[:, -new:]  # 0.25 = 1/√16
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous()  # as torch's; some models take a view of it
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(got, inputs, upstream)
    exact_ones = torch.autograd.grad(expected, inputs, upstream.double())
    torch.testing.assert_close(gradients, exact_ones, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_exact_enough_and_scores_too_large_for_it_are_left_to_torch(autocast, large, monkeypatch) -> None:
    """As keys with a bias have: rounded to 8 bits, scores of 200 would put the output off by a tenth."""
    left, by_torch = [], module.sdpa_attention_forward
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *a, **k: left.append(0) or by_torch(*a, **k))
    query, key, value = (x.detach() for x in heads(300))
    inputs = [query + 20 * large, key + 2 * large, value]
    rounded = [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = attention(LAYER, *(inputs if autocast else rounded), None)[0]
    expected = by_definition(*rounded, 0.25)
    assert (got.double() - expected).norm() < 0.01 * expected.norm()
    assert got.dtype == torch.bfloat16 and bool(left) == large


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_give_the_same_logits(kind: str, monkeypatch, exact) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    model, ids = tiny_model(kind), samples()[0]
    calls = []
    monkeypatch.setattr(torch, "baddbmm", lambda *a, run=torch.baddbmm, **k: calls.append(0) or run(*a, **k))
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt), chunked_attention():
            got = model(**ids).logits
            raise KeyboardInterrupt
        assert calls, "the model did not take it"
        calls.clear()
        expected = model(**ids).logits
    assert not calls, "torch's kernel is in force again"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_plain_causal_attention_is_left_to_torch(monkeypatch) -> None:
    left = []
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *a, **k: left.append((a[4], k)))
    q, k, v = heads(24, torch.bfloat16)
    mask = torch.zeros(1, 1, 24, 24)
    special = {"position_bias": mask, "softcap": 30.0, "s_aux": torch.zeros(6)}
    for arguments in ({name: value} for name, value in {"attention_mask": mask, "dropout": 0.1, **special}.items()):
        attention(LAYER, q, k, v, **{"attention_mask": None, **arguments})
    attention(LAYER, q, k, v, None, is_causal=False)
    attention(LAYER, q[:, :, :1], k, v, mask[:, :, :1])
    attention(LAYER, *heads(2049, torch.bfloat16), None)
    for other in (torch.float32, torch.float16):
        attention(LAYER, *(x.to(other) for x in (q, k, v)), None)
    attention(LAYER, q[:, :, :10], k, v, None)  # a cache
    attention(LAYER, *(x.expand(2, -1, -1, -1) for x in (q, k, v)), None)
    attention(LAYER, q, k, v.repeat(1, 3, 1, 1), None)
    assert len(left) == 12
    assert left[0][0] is mask and left[1][1]["dropout"] == 0.1 and left[2][1]["position_bias"] is mask
