"""Trained weights of a network: survivors alone in the masters, each on one process, gradients of all samples."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.tiny import tiny_model
from gblm_compress.training.weights import Survivors, Weights, owners

IDS = torch.arange(24)[None]


def student(kind: str = "llama"):
    """A tiny model, half of its weights zero; its layers, and its other parameters but the tables."""
    model = tiny_model(kind)
    layers = {f"{name}.weight": layer for block in prunable_layers(model) for name, layer in block.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < 0.5)
    parameters = dict(model.named_parameters())
    others = {n: p for n, p in parameters.items() if n not in layers and "wte" not in n and "embed" not in n}
    return model, layers, others


def loss(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.square().mean()


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6), (2, 40_000)])  # the last has columns that 16 bits do not number
@pytest.mark.parametrize("in_each_row", [None, 2, 0])
def test_survivors_are_those_of_the_mask(shape, in_each_row: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, dense = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    places = drawn < 0.3 if in_each_row is None else drawn.argsort(-1).argsort(-1) < in_each_row
    if in_each_row is None:
        places[0] = False  # a row without survivors
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(dense.clone())
    parametrize.register_parametrization(module, "weight", Survivors(places), unsafe=True)
    (trained,) = module.parameters()
    assert torch.equal(trained, dense.masked_select(places))
    assert torch.equal(module.weight, dense * places)
    (module.weight * dense).sum().backward()
    assert torch.equal(trained.grad, trained)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the layers of gpt2 are stored transposed
def test_masters_are_survivors_and_get_the_sum_of_all_samples_gradients(kind) -> None:
    model, layers, others = student(kind)
    plain = copy.deepcopy(model)
    loss(plain).backward()
    weights = Weights(layers, {}, others)
    with weights.trained_in(model):
        for _ in range(2):
            loss(model).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    weights.pull()
    for name, master in weights.masters.items():
        expected = 2 * plain.get_parameter(name).grad
        dense = expected[layers[name].weight != 0] if name in layers else expected
        assert torch.equal(master.trained.grad, dense), name


def test_each_tensor_is_on_one_process_and_all_have_about_as_much() -> None:
    sizes = {"a": 10, "b": 7, "c": 6, "d": 3, "e": 2}
    owner = owners(sizes, 2)
    assert [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in (0, 1)] == [15, 13]
    _, layers, others = student()
    shares = [set(Weights(layers, {}, others, ranks=Ranks(rank, 2)).masters) for rank in (0, 1)]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == {*layers, *others}
