"""Fits of surviving weights: the loop itself, blocks against the dense model, whole models against its predictions."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from gblm_compress.architecture import prunable_layers
from gblm_compress.distillation import distil_, head_inputs
from gblm_compress.errors import ModelError
from gblm_compress.fitting import fit
from gblm_compress.pruning import prune_
from gblm_compress.reconstruction import reconstruct_, relative_error
from gblm_compress.settings import PruneSettings
from gblm_compress.tiny import tiny_model
from tests.conftest import replay, samples


def line(count: int, scale: float = 1.0):
    """Points of y = Xw with w sparse, and the squared error of a weight on each."""
    generator = torch.Generator().manual_seed(0)
    truth = scale * torch.tensor([1.0, 0.0, -2.0, 0.0])
    points = torch.randn(count, 5, 4, generator=generator)

    def loss(weights, index):
        return (points[index] @ (weights["w"] - truth)).square().mean()

    return truth, loss


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_fit_finds_the_minimum_at_any_scale_and_keeps_zeros(scale: float) -> None:
    truth, loss = line(17, scale)
    start = truth * 1.5
    fitted, result = fit({"w": start}, loss, 17, epochs=40, rate=0.02)
    torch.testing.assert_close(fitted["w"], truth, rtol=0.02, atol=0)
    assert result.after < 0.01 * result.before and 0 < result.epochs <= 40
    assert torch.equal(start, truth * 1.5)


def test_weights_that_a_fit_would_harm_are_returned_as_they_were() -> None:
    """Held-out samples want the opposite of the others: early stopping must keep the start."""
    weights = {"w": torch.tensor([1.0, 0.0])}
    seen = []

    def loss(masters, index):
        seen.append(index)
        return masters["w"].square().sum() if index % 8 == 7 else -masters["w"].sum()

    fitted, result = fit(weights, loss, 16, epochs=50, rate=0.1)
    assert torch.equal(fitted["w"], weights["w"])
    assert (result.before, result.after, result.epochs) == (1.0, 1.0, 0)
    assert len(seen) < 4 * 16  # it gave up early


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_samples(count: int) -> None:
    truth, loss = line(count)
    _, result = fit({"w": truth * 1.5}, loss, count, epochs=5, rate=0.02)
    assert result.after < result.before


def test_a_layer_without_survivors_stays_empty() -> None:
    fitted, result = fit({"w": torch.zeros(3)}, lambda w, i: w["w"].sum() + 1, 3, epochs=2, rate=0.1)
    assert torch.equal(fitted["w"], torch.zeros(3)) and result.epochs == 0


def test_relative_error_weighs_every_token_alike() -> None:
    target = torch.tensor([[[1.0, 0.0], [1000.0, 0.0]]])
    small, huge = torch.zeros_like(target), torch.zeros_like(target)
    small[0, 0, 1], huge[0, 1, 1] = 0.1, 100.0
    assert float(relative_error(target + small, target)) == pytest.approx(0.005)
    assert float(relative_error(target + huge, target)) == pytest.approx(0.005)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_reconstruction_lowers_the_error_of_unseen_samples(kind: str, compute: str) -> None:
    ids, unseen = samples(16, 48), samples(4, 48, seed=5)
    dense = tiny_model(kind)
    pruned = tiny_model(kind)
    prune_(pruned, ids, PruneSettings(method="magnitude", pattern="2:4"), progress=_quiet())
    layers = prunable_layers(pruned)[0]

    def first_block(model, texts):
        return replay(model, texts).block(0)

    def error() -> float:
        block, reference = first_block(pruned, unseen), first_block(dense, unseen)
        pairs = zip(block.inputs, reference.inputs, strict=True)
        return sum(float(relative_error(block.run(x), reference.run(y))) for x, y in pairs)

    targets = [first_block(dense, ids).run(hidden) for hidden in first_block(dense, ids).inputs]
    masks = {name: layer.weight != 0 for name, layer in layers.items()}
    others = {
        name: parameter.detach().clone()
        for name, parameter in pruned.named_parameters()
        if name.removesuffix(".weight") not in layers
    }
    before = error()
    result = reconstruct_(first_block(pruned, ids), layers, targets, epochs=4, rate=0.02, compute=compute)
    assert result.after < 0.9 * result.before
    assert error() < 0.9 * before
    for name, layer in layers.items():
        assert torch.equal(layer.weight != 0, masks[name])
    for name, parameter in others.items():
        assert torch.equal(parameter, pruned.get_parameter(name))
    assert all(p.requires_grad and p.grad is None for p in pruned.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_head_inputs_give_the_logits(kind: str, progress) -> None:
    model = tiny_model(kind)
    ids = samples(2)
    for states, sample in zip(head_inputs(model, ids, progress), ids, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model.get_output_embeddings()(states), model(input_ids=sample).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_distillation_lowers_the_divergence_on_unseen_samples(kind: str, progress) -> None:
    ids, unseen = samples(16, 48), samples(4, 48, seed=5)
    dense, pruned = tiny_model(kind), tiny_model(kind)
    prune_(pruned, ids, PruneSettings(method="wanda", pattern="2:4"), progress)
    layers = {name: layer for block in prunable_layers(pruned) for name, layer in block.items()}
    masks = {name: layer.weight != 0 for name, layer in layers.items()}

    @torch.no_grad()
    def divergence() -> float:
        total = 0.0
        for sample in unseen:
            p, q = (model(input_ids=sample).logits[0] for model in (dense, pruned))
            soft = p.softmax(-1)
            total += float(cross_entropy(q, soft) - cross_entropy(p, soft))
        return total

    before = divergence()
    result = distil_(
        pruned,
        layers,
        ids,
        head_inputs(dense, ids, progress),
        epochs=4,
        rate=0.02,
        compute="float32",
        progress=progress,
    )
    assert result.after < 0.95 * result.before
    assert divergence() < 0.95 * before
    for name, layer in layers.items():
        assert torch.equal(layer.weight != 0, masks[name])
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    assert torch.equal(pruned.get_output_embeddings().weight, dense.get_output_embeddings().weight)
    assert all(p.requires_grad for p in pruned.parameters())


def test_masters_are_float32_where_the_model_is_not(progress) -> None:
    """Steps far below the resolution of bfloat16 must add up."""
    ids = samples(16, 48)
    model = tiny_model("llama").bfloat16()
    dense = tiny_model("llama").bfloat16()
    settings = PruneSettings(method="wanda", pattern="2:4")
    prune_(model, ids, settings, progress)
    layers = {name: layer for block in prunable_layers(model) for name, layer in block.items()}
    result = distil_(
        model, layers, ids, head_inputs(dense, ids, progress), epochs=3, rate=1e-3, compute="float32", progress=progress
    )
    assert result.after < result.before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_without_a_head_is_refused(progress) -> None:
    with pytest.raises(ModelError, match="has no output head"):
        head_inputs(tiny_model("llama").model.layers[0], samples(1), progress)


def _quiet():
    from gblm_compress.progress import Progress

    return Progress(quiet=True)
