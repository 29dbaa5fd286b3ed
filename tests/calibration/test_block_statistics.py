"""Gram matrices and regional gradients against whole forward passes, one token and one sample at a time."""

import pytest
import torch

from gblm_compress.calibration.blocks import Block, activation_norms, gram_matrices, regional_norms
from gblm_compress.errors import ModelError
from gblm_compress.methods.fits import activation_norms_of
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.tiny import tiny_model
from tests.conftest import ARCHITECTURES, replay, samples


def second_block(kind: str, ids) -> tuple[Block, dict[str, torch.nn.Module]]:
    model = tiny_model(kind)
    states = replay(model, ids)
    states.advance(0)
    return states.block(1), prunable_layers(model)[1]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gram_is_the_sum_of_outer_products_token_by_token(kind: str) -> None:
    ids = samples()
    block, layers = second_block(kind, ids)
    grams = gram_matrices(block, layers)
    model = tiny_model(kind)
    slow = {name: torch.zeros(grams[name].shape, dtype=torch.float64) for name in layers}

    def outer(name):
        def hook(module, args):
            for token in args[0].reshape(-1, args[0].shape[-1]).double():
                slow[name] += torch.outer(token, token)

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(outer(name))
    with torch.no_grad():
        for sample in ids:
            model(**sample)
    norms = activation_norms(block, layers)
    for name, gram in grams.items():
        torch.testing.assert_close(gram.double(), slow[name], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(activation_norms_of(gram, len(ids)), norms[name])


def test_layers_with_one_input_share_the_matrix() -> None:
    block, layers = second_block("llama", samples())
    grams = {name.rpartition(".")[2]: gram for name, gram in gram_matrices(block, layers).items()}
    assert grams["q_proj"] is grams["k_proj"] is grams["v_proj"]
    assert grams["gate_proj"] is grams["up_proj"]
    assert len({id(gram) for gram in grams.values()}) == 4


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_regional_norms_are_gradients_of_the_block_output_by_finite_differences(kind: str) -> None:
    block, layers = second_block(kind, samples())
    regional = regional_norms(block, layers)
    block.module.double()
    calls = [_double(call) for call in block.calls]
    double = Block(block.module, calls, [hidden.double() for hidden in block.inputs], block.counted)
    for name, layer in layers.items():
        for index in ((0, 0), (3, 5)):
            squares = 0.0
            for sample in range(len(double.inputs)):
                norms = []
                for step in (5e-3, -5e-3):
                    with torch.no_grad():
                        layer.weight[index] += step
                        norms.append(float(double.run(sample).norm()))
                        layer.weight[index] -= step
                squares += ((norms[0] - norms[1]) / 1e-2) ** 2
            expected = (squares / len(double.inputs)) ** 0.5
            assert float(regional[name][index]) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def _double(call):
    def convert(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return tuple(map(convert, value)) if isinstance(value, tuple) else value

    kwargs = {name: convert(value) for name, value in call.kwargs.items()}
    return type(call)(tuple(map(convert, call.args)), kwargs, call.hidden_is_keyword)


def test_no_gradient_is_left_behind() -> None:
    block, layers = second_block("llama", samples())
    before = [parameter.requires_grad for parameter in block.module.parameters()]
    regional_norms(block, layers)
    assert [parameter.requires_grad for parameter in block.module.parameters()] == before
    assert all(parameter.grad is None for parameter in block.module.parameters())


def test_activations_that_overflow_are_named() -> None:
    block, layers = second_block("llama", samples())
    layers["model.layers.1.mlp.up_proj"].weight.data.fill_(1e30)
    layers["model.layers.1.mlp.gate_proj"].weight.data.fill_(1e30)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: .*activations are NaN or infinite"):
        gram_matrices(block, layers)
