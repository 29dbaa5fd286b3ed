"""Statistics of blocks against whole forward passes, one token and one sample at a time."""

import pytest
import torch

from gblm_compress.calibration import blocks
from gblm_compress.calibration.blocks import Block, layer_statistics
from gblm_compress.errors import ModelError
from gblm_compress.methods.choices import Need
from gblm_compress.models.architecture import as_matrix, prunable_layers
from tests.conftest import ARCHITECTURES, replay, samples, tiny_model
from tests.tasks.families import inputs_of


def measured(block: Block, layers, need: Need, field: str) -> dict[str, torch.Tensor]:
    return {name: getattr(found, field) for name, found in layer_statistics(block, layers, {}, need).items()}


def activation_norms(block: Block, layers) -> dict[str, torch.Tensor]:
    return measured(block, layers, Need.ACTIVATIONS, "activation_norm")


def gram_matrices(block: Block, layers) -> dict[str, torch.Tensor]:
    return measured(block, layers, Need.GRAM, "gram")


@torch.no_grad()
def slow_grams(model, layers, ids) -> dict[str, torch.Tensor]:
    """Sums of outer products, by hooks on whole forward passes."""
    sums = {}
    for sample in ids:
        for name, x in inputs_of(model, layers, sample).items():
            for token in x.double():
                sums[name] = sums.get(name, 0) + torch.outer(token, token)
    return sums


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_replay_measures_what_whole_forward_passes_of_the_changed_model_see(kind: str) -> None:
    model, ids = tiny_model(kind), samples()
    states = replay(model, ids)
    for index, layers in enumerate(prunable_layers(model)):
        block, slow = states.block(index), slow_grams(model, layers, ids)
        grams, norms = gram_matrices(block, layers), activation_norms(block, layers)
        with_grams = measured(block, layers, Need.GRAM | Need.ACTIVATIONS, "activation_norm")
        for name, layer in layers.items():
            torch.testing.assert_close(grams[name].double(), slow[name], rtol=1e-4, atol=1e-3)
            expected = (slow[name].diagonal() / len(ids)).sqrt().float()
            torch.testing.assert_close(norms[name], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(with_grams[name], norms[name])
            layer.weight.mul_(0.5)
        states.advance(index)


def test_a_block_runs_no_further_than_its_last_layer_unless_a_layer_runs_twice() -> None:
    model, ids = tiny_model("llama"), samples()
    states, layers = replay(model, ids), prunable_layers(model)[0]
    expected = {name: (gram.diagonal() / 3).sqrt().float() for name, gram in slow_grams(model, layers, ids).items()}
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


def second_block(kind: str = "llama") -> tuple[Block, dict[str, torch.nn.Module]]:
    model = tiny_model(kind)
    states = replay(model, samples())
    states.advance(0)
    return states.block(1), prunable_layers(model)[1]


def test_layers_with_one_input_share_the_matrix() -> None:
    grams = {name.rpartition(".")[2]: gram for name, gram in gram_matrices(*second_block()).items()}
    assert grams["q_proj"] is grams["k_proj"] is grams["v_proj"]
    assert grams["gate_proj"] is grams["up_proj"]
    assert len({id(gram) for gram in grams.values()}) == 4


def test_where_an_expert_gets_no_token_no_matrix_is_copied_but_shared_ones(monkeypatch) -> None:
    block, layers = second_block()
    idle = torch.nn.Linear(8, 8, bias=False)
    made, add = [], blocks._add_products
    monkeypatch.setattr(blocks, "_add_products", lambda total, x: made.append(add(total, x)) or made[-1])
    grams = gram_matrices(block, layers | {"idle": idle})
    is_made = {name.rpartition(".")[2] for name, gram in grams.items() if any(gram is one for one in made)}
    assert is_made == {"o_proj", "down_proj", "idle"}
    assert not grams["idle"].any()
    assert len({id(gram) for gram in grams.values()}) == len(grams)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_regional_norms_are_gradients_of_the_norm_of_the_blocks_output(kind: str) -> None:
    block, layers = second_block(kind)
    regional = measured(block, layers, Need.REGIONAL, "regional_norm")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.module.parameters())
    norms = [call.run(block.module, hidden).norm() for call, hidden in zip(block.calls, block.inputs, strict=True)]
    for name, layer in layers.items():
        gradients = [torch.autograd.grad(norm, layer.weight, retain_graph=True)[0] for norm in norms]
        expected = torch.stack(gradients).square().mean(0).sqrt()
        torch.testing.assert_close(regional[name], as_matrix(layer, expected), rtol=1e-4, atol=1e-6)


def test_activations_that_overflow_are_named() -> None:
    block, layers = second_block()
    for name in ("up_proj", "gate_proj"):
        layers[f"model.layers.1.mlp.{name}"].weight.data.fill_(1e30)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: .*activations are NaN or infinite"):
        gram_matrices(block, layers)
