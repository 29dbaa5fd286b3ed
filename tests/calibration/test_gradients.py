"""Gradient norms in both orders against plain autograd through the whole model; and what is held meanwhile."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gblm_compress.calibration.calls import BlockCalls
from gblm_compress.calibration.gradients import GradientPass
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import ResidentWeights, StatePool
from gblm_compress.errors import ModelError
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.progress import Progress
from gblm_compress.tasks import causal_lm
from tests.conftest import ARCHITECTURES, CAUSAL_LM, in_memory, samples, tiny_model


def all_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for block in prunable_layers(model) for name, layer in block.items()}


def norms_of(model, ids, norm="l1", pool=None, skip=frozenset(), by_sample=False) -> dict[int, dict[str, Tensor]]:
    weights = ResidentWeights(model)
    calls = BlockCalls(weights, CAUSAL_LM, ids)
    measuring = GradientPass(weights, calls, pool or in_memory(), Ranks(), Progress(quiet=True))
    wanted = {index: block for index, block in enumerate(prunable_layers(model)) if index not in skip}
    return dict(measuring.norms(wanted, norm, by_sample))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("loss_tokens", [7, 256])
def test_gradient_norms_are_those_of_plain_autograd(kind: str, norm: str, loss_tokens: int, monkeypatch) -> None:
    monkeypatch.setattr(causal_lm, "LOSS_TOKENS", loss_tokens)  # the samples have 24
    model, ids = tiny_model(kind), samples()
    layers = all_layers(model)
    found = norms_of(model, ids, norm)
    assert list(found) == [1, 0]
    got = found[0] | found[1]
    losses = [model(**sample, labels=sample["input_ids"]).loss for sample in ids]  # transformers' own
    for name, layer in layers.items():
        gradients = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
        stacked = torch.stack(gradients).double()
        expected = stacked.abs().sum(0) if norm == "l1" else stacked.square().sum(0).sqrt()
        assert expected.max() > 0
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("skip", [frozenset(), frozenset({0}), frozenset({1})])
def test_both_orders_give_the_same_bits_and_leave_no_states(kind: str, norm: str, skip, tmp_path: Path) -> None:
    model, ids = tiny_model(kind), samples()
    pool = StatePool(tmp_path, room := 3 * 24 * 64 * 4, torch.device("cpu"))  # for one place of three samples
    one, other = (norms_of(model, ids, norm, pool, skip, by_sample) for by_sample in (False, True))
    assert pool.left == room and not list(tmp_path.iterdir())
    assert list(one) == list(other) == [index for index in (1, 0) if index not in skip]
    assert all(torch.equal(one[index][name], other[index][name]) for index in one for name in one[index])


@pytest.mark.parametrize("by_sample", [False, True])
def test_one_gradient_exists_at_a_time_and_flags_are_restored(by_sample: bool) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    held, weights = [], [layer.weight for layer in all_layers(model).values()]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: held.append(sum(one.grad is not None for one in weights)))
    norms_of(model, samples(), "l2", by_sample=by_sample)
    assert held and max(held) == 1 and all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("by_sample", [False, True])
def test_nothing_runs_backwards_below_the_lowest_block_that_is_pruned(by_sample: bool) -> None:
    model, ids, backward = tiny_model("llama"), samples(), []
    assert norms_of(model, ids, skip={0, 1}, by_sample=by_sample) == {}
    model.model.layers[0].mlp.up_proj.register_full_backward_hook(lambda *_: backward.append(0))
    found = norms_of(model, ids, skip={0}, by_sample=by_sample)
    assert list(found) == [1] and not backward
    whole = norms_of(tiny_model("llama"), ids)
    assert all(torch.equal(found[1][name], whole[1][name]) for name in found[1])


@pytest.mark.parametrize("by_sample", [False, True])
def test_overflowing_gradients_name_the_layer(by_sample: bool) -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"model\.layers\.\d.*gradients are NaN or infinite.*--dtype float32"):
        norms_of(model, samples(), by_sample=by_sample)
