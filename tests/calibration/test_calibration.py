"""Statistics against plain autograd and plain forward passes, on every architecture."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from gblm_compress.calibration.blocks import activation_norms
from gblm_compress.calibration.calls import BlockCalls, NoChainError
from gblm_compress.calibration.weights import ResidentWeights
from gblm_compress.errors import ModelError
from gblm_compress.models.architecture import find_blocks, prunable_layers
from gblm_compress.models.tiny import tiny_model
from tests.conftest import ARCHITECTURES, CAUSAL_LM, replay, samples


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


def test_blocks_that_do_not_form_a_chain_are_refused() -> None:
    model, ids = tiny_model("llama"), samples()
    _, blocks = find_blocks(model)
    blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ModelError, match="block 1 does not take the output of the block before it"):
        replay(model, ids)


def test_blocks_that_share_weights_are_refused() -> None:
    model, ids = tiny_model("llama"), samples()
    one, other = model.model.layers
    other.mlp.up_proj.weight = one.mlp.up_proj.weight
    with pytest.raises(NoChainError, match="blocks 0 and 1 share weights"):
        replay(model, ids)


@pytest.mark.parametrize("order", [(0, 0, 1), (0, 1, 0)])
def test_blocks_that_run_twice_are_refused(order: tuple[int, ...]) -> None:
    model, ids = tiny_model("llama"), samples()
    model.model.layers = Repeated([model.model.layers[index] for index in order])
    model.config.num_hidden_layers = len(order)
    with pytest.raises(NoChainError, match="block 0 runs more than once"):
        replay(model, ids)


class Repeated(torch.nn.ModuleList):
    """Blocks some of which are the same, as a loop over them sees them; it holds each of them once."""

    def __init__(self, blocks) -> None:
        super().__init__(dict.fromkeys(blocks))
        self.order = blocks

    def __getitem__(self, index):
        return self.order[index] if isinstance(index, slice) else super().__getitem__(index)


def test_blocks_that_do_not_run_are_refused() -> None:
    model, ids = tiny_model("llama"), samples()
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    with pytest.raises(NoChainError, match="a forward pass ran 2 blocks of 3"):
        replay(model, ids)


def test_only_the_first_block_computes_while_calls_are_recorded() -> None:
    model, ids = tiny_model("llama"), samples()
    ran = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    BlockCalls(ResidentWeights(model), CAUSAL_LM, ids)
    assert ran == [0, 0]  # the first sample, twice
    assert all("forward" not in vars(block) for block in model.model.layers)


def give_beside(model, monkeypatch, compute) -> list:
    """Let blocks return what `compute` gives beside the hidden states, and the model unpack it, as Bamba does.

    Returns:
        What the model has got so, also later.
    """
    seen = []
    for block in model.model.layers:
        monkeypatch.setattr(block, "forward", lambda *a, run=block.forward, **k: (run(*a, **k), compute()))

    class Unpack(torch.nn.ModuleList):
        def __getitem__(self, index):
            def unpacking(block):
                def call(*args, **kwargs):
                    hidden, beside = block(*args, **kwargs)
                    seen.append(beside)
                    return hidden

                return call

            return [unpacking(block) for block in super().__getitem__(index)]

    model.model.layers = Unpack(model.model.layers)
    return seen


def test_what_blocks_return_beside_the_hidden_states_is_given_back(monkeypatch) -> None:
    model, ids = tiny_model("llama"), samples()
    expected = replay(model, ids)
    expected.advance(0)
    seen = give_beside(model, monkeypatch, lambda: "weights")
    got = replay(model, ids)
    got.advance(0)
    assert all(torch.equal(one, other) for one, other in zip(got.hidden, expected.hidden, strict=True))
    assert seen and set(seen) == {"weights"}


def test_a_tensor_that_the_first_block_returns_is_each_samples_own_argument_of_the_next(monkeypatch) -> None:
    model, ids, given = tiny_model("llama"), samples(3), {}
    model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    seen = give_beside(model, monkeypatch, lambda: given["input_ids"].sum())
    _, blocks = find_blocks(model)
    blocks[1].register_forward_pre_hook(lambda m, a, k: (a, {**k, "extra": seen[-1]}), with_kwargs=True)
    _, second = BlockCalls(ResidentWeights(model), CAUSAL_LM, ids).calls
    assert [int(call.kwargs["extra"]) for call in second] == [int(sample["input_ids"].sum()) for sample in ids]


def test_a_mapping_that_blocks_fill_for_each_other_is_refused() -> None:
    model, ids = tiny_model("llama"), samples()
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda m, a, k: (a, {**k, "shared": {}}), with_kwargs=True)
    with pytest.raises(ModelError, match="block 0 gets an empty mapping"):
        replay(model, ids)


def with_argument(model, compute) -> None:
    """Give the second block an argument that is computed from (token ids, what the first block gives)."""
    _, blocks = find_blocks(model)
    seen = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "extra": compute(seen["input_ids"], args[0])}), with_kwargs=True
    )


def test_arguments_that_depend_on_what_blocks_compute_are_refused() -> None:
    model = tiny_model("llama")
    with_argument(model, lambda ids, hidden: hidden.sum())
    with pytest.raises(ModelError, match="block 1: its argument 'extra' depends on what blocks before it compute"):
        replay(model, samples())


def test_each_sample_has_its_own_arguments_where_they_differ_and_one_memory_where_not() -> None:
    model, ids = tiny_model("llama"), samples(3)
    with_argument(model, lambda ids, hidden: ids.sum())
    ids[2] = {"input_ids": ids[0]["input_ids"].flip(1)}  # of the same sum
    first, second = BlockCalls(ResidentWeights(model), CAUSAL_LM, ids).calls
    assert first[0] is first[1] is first[2] and second[0] is second[2] is not second[1]
    assert [int(call.kwargs["extra"]) for call in second] == [int(sample["input_ids"].sum()) for sample in ids]
    cosines = [call.kwargs["position_embeddings"][0] for call in second]
    assert cosines[0] is cosines[1] is cosines[2]


def test_loss_is_the_mean_over_predicted_tokens() -> None:
    """The loss behind the gradients is transformers' label loss; stated here independently of autograd."""
    model, ids = tiny_model("llama"), samples()[0]["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    terms = [cross_entropy(output.logits[0, t], ids[0, t + 1]) for t in range(ids.shape[1] - 1)]
    torch.testing.assert_close(torch.stack(terms).mean(), output.loss)
