"""Statistics of blocks against whole forward passes, one token and one sample at a time."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from gblm_compress.calibration.blocks import Block, activation_norms, gram_matrices, regional_norms
from gblm_compress.errors import ModelError
from gblm_compress.methods.fits import activation_norms_of
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.tiny import tiny_model
from tests.conftest import ARCHITECTURES, replay, samples


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_replay_sees_what_a_whole_forward_pass_sees(kind: str) -> None:
    """With a block changed half-way: inputs of later blocks are those of the changed model."""
    model, ids = tiny_model(kind), samples()
    per_block = prunable_layers(model)
    states = replay(model, ids)
    for index, layers in enumerate(per_block):
        got = activation_norms(states.block(index), layers)
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(0.5)
        states.advance(index)
        # The oracle: hooks on whole forward passes of a model whose blocks before `index` are changed.
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(2.0)
        expected = slow_activation_norms(model, layers, ids)
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(0.5)
        for name in layers:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def keep_input(inputs, name, module, args) -> None:
    inputs[name] = args[0]


def slow_activation_norms(model, layers, ids):
    sums = {}
    for sample in ids:
        inputs = {}
        hooks = [layer.register_forward_pre_hook(partial(keep_input, inputs, name)) for name, layer in layers.items()]
        with torch.no_grad():
            model(**sample, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, x in inputs.items():
            for token in x.reshape(-1, x.shape[-1]):
                sums[name] = sums.get(name, 0) + token.double() ** 2
    return {name: (total / len(ids)).sqrt().float() for name, total in sums.items()}


def test_a_block_runs_no_further_than_its_last_layer_unless_a_layer_runs_twice() -> None:
    ids = samples()
    model = tiny_model("llama")
    states, layers = replay(model, ids), prunable_layers(model)[0]
    expected = slow_activation_norms(model, layers, ids)
    down, up = (layers[f"model.layers.0.mlp.{name}_proj"] for name in ("down", "up"))
    runs = []
    down.register_forward_hook(lambda *_: runs.append(0))
    got = activation_norms(states.block(0), layers)
    assert len(runs) == 1  # of three samples, the first
    for name in layers:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
    # Now a layer runs again behind the last one: nothing of it may be missed.
    ones = torch.ones(1, 1, up.weight.shape[1])
    down.register_forward_hook(lambda *_: up(ones) is None or None)
    twice = activation_norms(states.block(0), layers)["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(twice.square(), got["model.layers.0.mlp.up_proj"].square() + 1.0, rtol=1e-4, atol=1e-5)
    assert len(runs) == 1 + len(ids)


def test_hooks_are_removed_even_when_a_forward_pass_raises() -> None:
    model, ids = tiny_model("llama"), samples()
    states = replay(model, ids)
    layers = prunable_layers(model)[0]
    block = replace(states.block(0), inputs=[torch.zeros(1, 24, 3)])  # a width no block takes
    with pytest.raises(RuntimeError):
        activation_norms(block, layers)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


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

    return type(call)({name: convert(value) for name, value in call.arguments.items()}, call.hidden)


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
