"""Recorded calls of blocks, what is refused, and blocks that are no chain."""

import copy

import pytest
import torch

from gblm_compress.calibration.blocks import BlockReplay
from gblm_compress.calibration.calls import BlockCalls, NoChainError, calls_of
from gblm_compress.calibration.gradients import GradientPass
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import ResidentWeights
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.progress import Progress
from gblm_compress.tasks import TASKS
from tests.calibration.test_blocks import activation_norms
from tests.conftest import CAUSAL_LM, in_memory, replay, samples, tiny_model
from tests.families.tiny import tiny_family
from tests.tasks import families


def called_with(block: int, change):
    """A function that lets a block of a model be called with what `change` makes of its arguments."""
    return lambda model: model.model.layers[block].register_forward_pre_hook(change, with_kwargs=True)


def with_argument(model, compute) -> None:
    """Give the second block an argument that is computed from (token ids, what the first block gives)."""
    seen = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    called_with(1, lambda _, args, more: (args, more | {"extra": compute(seen["input_ids"], args[0])}))(model)


def share(model) -> None:
    one, other = model.model.layers
    other.mlp.up_proj.weight = one.mlp.up_proj.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (called_with(1, lambda _, args, more: ((args[0] + 1,), more)), "block 1 does not take the output of the block"),
        (called_with(0, lambda _, args, more: (args, more | {"shared": {}})), "block 0 gets an empty mapping"),
        (share, "blocks 0 and 1 share weights"),
        (lambda model: model.model.layers.append(copy.deepcopy(model.model.layers[0])), "ran 2 blocks of 3"),
        (lambda model: with_argument(model, lambda ids, hidden: hidden.sum()), "block 1: its argument 'extra' depends"),
    ],
)
def test_blocks_that_are_no_chain_are_refused(change, message) -> None:
    model = tiny_model("llama")
    change(model)
    with pytest.raises(NoChainError, match=message):
        replay(model, samples())


def test_only_the_first_block_computes_while_calls_are_recorded() -> None:
    model, ids = tiny_model("llama"), samples()
    ran = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    BlockCalls(ResidentWeights(model), CAUSAL_LM, ids)
    assert ran == [0, 0]  # the first sample, twice
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_what_blocks_return_beside_the_hidden_states_is_given_back() -> None:
    """Bamba's blocks return a tuple, and the model unpacks it."""
    model, ids = tiny_family("bamba"), samples()
    states = replay(model, ids)
    states.advance(0)
    states.advance(1)
    for hidden, sample in zip(states.hidden, ids, strict=True):
        assert torch.equal(hidden[0], families.inputs_of(model, {"": model.model.final_layernorm}, sample)[""])


def test_a_tensor_that_the_first_block_returns_is_each_samples_own_argument_of_the_next(monkeypatch) -> None:
    model, ids, given = tiny_model("llama"), samples(3), {}
    model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    block = model.model.layers[0]
    monkeypatch.setattr(block, "forward", lambda *a, run=block.forward, **k: (run(*a, **k), given["input_ids"].sum()))
    called_with(1, lambda _, args, more: (args[0][:1], more | {"extra": args[0][1]}))(model)
    model.model.norm.register_forward_pre_hook(lambda _, args: args[0][:1])
    _, second = BlockCalls(ResidentWeights(model), CAUSAL_LM, ids).calls
    assert [int(call.arguments["extra"]) for call in second] == [int(sample["input_ids"].sum()) for sample in ids]


def test_each_sample_has_its_own_arguments_where_they_differ_and_one_memory_where_not() -> None:
    model, ids = tiny_model("llama"), samples(3)
    with_argument(model, lambda ids, hidden: ids.sum())
    ids[2] = {"input_ids": ids[0]["input_ids"].flip(1)}  # of the same sum
    first, second = BlockCalls(ResidentWeights(model), CAUSAL_LM, ids).calls
    assert first[0] is first[1] is first[2] and second[0] is second[2] is not second[1]
    assert [int(call.arguments["extra"]) for call in second] == [int(sample["input_ids"].sum()) for sample in ids]
    cosines = [call.arguments["position_embeddings"][0] for call in second]
    assert cosines[0] is cosines[1] is cosines[2]


def albert():
    """Its one block runs three times."""
    ids = [{**one, "attention_mask": torch.ones(1, 24, dtype=torch.long)} for one in samples(4)]
    labelled = [{**one, "labels": torch.tensor([number % 3])} for number, one in enumerate(ids)]
    return families.encoder("albert", "AutoModelForSequenceClassification"), TASKS["classification"], labelled


def shared():
    """Two blocks that share a weight."""
    model = tiny_model("llama")
    share(model)
    return model, CAUSAL_LM, [{**one, "labels": one["input_ids"]} for one in samples()]


@pytest.mark.parametrize("make", [albert, shared])
def test_a_weight_that_runs_several_times_is_measured_in_all_of_its_runs(make) -> None:
    """Activations by hooks, gradients by plain autograd of transformers' loss."""
    model, task, ids = make()
    weights, calls, (layers,) = calls_of(ResidentWeights(model), task, ids, prunable_layers(model))
    activations = activation_norms(BlockReplay(calls, weights, in_memory(), Ranks()).block(0), layers)
    measuring = GradientPass(weights, calls, in_memory(), Ranks(), Progress(quiet=True))
    ((_, gradients),) = measuring.norms({0: layers}, "l1")
    for name, layer in layers.items():
        users = {path: one for path, one in model.named_modules() if getattr(one, "weight", None) is layer.weight}
        inputs = [x for sample in ids for x in families.inputs_of(model, users, sample).values()]
        squares = sum(x.square().sum(0) for x in inputs)
        torch.testing.assert_close(activations[name], (squares / len(ids)).sqrt(), rtol=1e-4, atol=1e-5)
        of_samples = [torch.autograd.grad(model(**sample).loss, layer.weight)[0] for sample in ids]
        torch.testing.assert_close(gradients[name], torch.stack(of_samples).abs().sum(0), rtol=1e-3, atol=1e-6)


def test_what_is_around_the_blocks_is_the_innermost_module_that_runs_once() -> None:
    """ALBERT's classifier reads what a pooler makes of the encoder's output; HRM repeats the module of its blocks."""
    embedder, classifier = (families.encoder("albert", TASKS[t].auto_class) for t in ("embedding", "classification"))
    ids = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples()]
    for model, encoder in ((embedder, embedder.encoder), (classifier, classifier.albert.encoder)):
        assert calls_of(ResidentWeights(model), TASKS["embedding"], ids, [])[0].blocks == [encoder]
    loop = tiny_family("hrm_text")
    with pytest.raises(NoChainError, match="block 0 runs more than once"):
        replay(loop, samples())
    assert calls_of(ResidentWeights(loop), CAUSAL_LM, samples(), [])[0].blocks == [loop.model]
