"""Statistics against plain autograd and plain forward passes, on every architecture."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from gblm_compress.architecture import find_blocks, prunable_layers
from gblm_compress.calibration import BlockReplay, activation_norms, gradient_norms
from gblm_compress.errors import ModelError
from gblm_compress.progress import Progress
from gblm_compress.tiny import tiny_model
from tests.conftest import ARCHITECTURES, samples


def all_layers(model):
    return {name: layer for block in prunable_layers(model) for name, layer in block.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient_norms_are_those_of_plain_autograd(kind: str, norm: str, progress: Progress) -> None:
    model, ids = tiny_model(kind), samples()
    layers = all_layers(model)
    got = gradient_norms(model, layers, ids, norm, progress)
    per_sample = []
    for sample in ids:
        # transformers' own loss, not ours
        loss = model(input_ids=sample, labels=sample).loss
        per_sample.append(torch.autograd.grad(loss, [layer.weight for layer in layers.values()]))
    for index, name in enumerate(layers):
        gradients = torch.stack([sample[index] for sample in per_sample]).double()
        expected = gradients.abs().sum(0) if norm == "l1" else gradients.square().sum(0).sqrt()
        assert expected.max() > 0
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-3, atol=1e-7)


def test_gradients_are_freed_and_flags_restored(progress: Progress) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    gradient_norms(model, all_layers(model), samples(), "l1", progress)
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_no_full_set_of_gradients_ever_exists(progress: Progress) -> None:
    """While the backward pass runs, no more than one layer's gradient is held beside the accumulators."""
    model = tiny_model("llama")
    layers = all_layers(model)
    held = []

    def count(gradient: torch.Tensor) -> None:
        held.append(sum(layer.weight.grad is not None for layer in layers.values()))

    for layer in layers.values():
        layer.register_forward_hook(lambda module, args, output: output.register_hook(count) and None)
    gradient_norms(model, layers, samples(), "l2", progress)
    assert held and max(held) <= 1


def test_overflowing_gradients_name_the_layer(progress: Progress) -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"model\.layers\.\d.*gradients are NaN or infinite.*--dtype float32"):
        gradient_norms(model, all_layers(model), samples(), "l1", progress)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_replay_sees_what_a_whole_forward_pass_sees(kind: str) -> None:
    """With a block changed half-way: inputs of later blocks are those of the changed model."""
    model, ids = tiny_model(kind), samples()
    _, blocks = find_blocks(model)
    per_block = prunable_layers(model)
    replay = BlockReplay(model, blocks, ids)
    for index, layers in enumerate(per_block):
        got = activation_norms(replay.block(index), layers)
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(0.5)
        replay.advance(index)
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
            model(input_ids=sample, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, x in inputs.items():
            for token in x.reshape(-1, x.shape[-1]):
                sums[name] = sums.get(name, 0) + token.double() ** 2
    return {name: (total / len(ids)).sqrt().float() for name, total in sums.items()}


def test_hooks_are_removed_even_when_a_forward_pass_raises() -> None:
    model, ids = tiny_model("llama"), samples()
    _, blocks = find_blocks(model)
    replay = BlockReplay(model, blocks, ids)
    layers = prunable_layers(model)[0]
    replay.hidden[0] = torch.zeros(1, 24, 3)  # a width no block takes
    with pytest.raises(RuntimeError):
        activation_norms(replay.block(0), layers)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_blocks_that_do_not_form_a_chain_are_refused() -> None:
    model, ids = tiny_model("llama"), samples()
    _, blocks = find_blocks(model)
    blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ModelError, match="block 1 does not take the output of the block before it"):
        BlockReplay(model, blocks, ids)


def test_arguments_that_depend_on_the_text_are_refused() -> None:
    model, ids = tiny_model("llama"), samples()
    _, blocks = find_blocks(model)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "text": seen[-1]}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="block 1: its argument 'text' depends on the text"):
        BlockReplay(model, blocks, ids)


def test_loss_is_the_mean_over_predicted_tokens() -> None:
    """The loss behind the gradients is transformers' label loss; stated here independently of autograd."""
    model, (ids, *_) = tiny_model("llama"), samples()
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    terms = [cross_entropy(output.logits[0, t], ids[0, t + 1]) for t in range(ids.shape[1] - 1)]
    torch.testing.assert_close(torch.stack(terms).mean(), output.loss)
