"""Pruning of mixtures of experts, against whole forward passes."""

import torch

from gblm_compress.models.experts import unfused
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.progress import Progress
from gblm_compress.pruning.block_pruning import FEW_TOKENS
from gblm_compress.pruning.stage import PruneResult, prune_in_place
from gblm_compress.pruning.walk import UNSEEN
from gblm_compress.settings import CalibrationSettings, PruneSettings
from tests.conftest import prune_, samples
from tests.families.tiny import tiny_family
from tests.tasks.families import slow_masks

EXPERTS = "model.layers.0.mlp.experts"


def test_masks_are_those_of_whole_forward_passes() -> None:
    """With experts as layers; that these and their gradients are the fused ones is tested in test_experts.py."""
    model, slow, ids = tiny_family("mixtral"), tiny_family("mixtral"), samples(3, 64)
    results = prune_(model, ids, method="gblm", allocation="uniform")
    losses = [lambda model, ids=one["input_ids"]: model(ids, labels=ids).loss for one in ids]
    with unfused(slow), unfused(model):
        expected = slow_masks(slow, ids, losses, 100.0)
        wrong = {name: (model.get_submodule(name).weight != 0) != mask for name, mask in expected.items()}
    assert results.keys() == expected.keys() and not any(layer.by_magnitude for layer in results.values())
    assert float(torch.cat([each.flatten() for each in wrong.values()]).double().mean()) < 1e-3


def test_an_expert_with_few_tokens_goes_by_magnitude() -> None:
    model, before, ids, chosen = tiny_family("mixtral"), tiny_family("mixtral"), samples(2, 32), []
    before.get_submodule(EXPERTS).register_forward_pre_hook(lambda module, args: chosen.append(args[1].flatten()))
    for sample in ids:
        before(**sample)
    dense, got = before.get_parameter(f"{EXPERTS}.gate_up_proj"), torch.cat(chosen).bincount(minlength=4).tolist()
    assert min(got) < FEW_TOKENS <= max(got), "the seed gives both kinds"
    results = prune_(model, ids, method="wanda")
    pruned = model.get_parameter(f"{EXPERTS}.gate_up_proj")
    for expert, tokens in enumerate(got):
        assert results[f"{EXPERTS}.{expert}.gate_up_proj"].by_magnitude == (tokens < FEW_TOKENS)
        largest = dense[expert].abs().topk(32).indices.sort().values
        kept = torch.stack([row.nonzero().flatten() for row in pruned[expert]])
        assert torch.equal(largest, kept) == (tokens < FEW_TOKENS)


def pruned_in_place(family: str, text: CalibrationSettings) -> PruneResult:
    settings = PruneSettings(method="wanda", fit="none")
    return prune_in_place(tiny_family(family), byte_tokenizer(), settings, text, Progress(quiet=True))


def test_experts_with_few_tokens_are_named(prose) -> None:
    result = pruned_in_place("mixtral", CalibrationSettings(dataset=str(prose), samples=2, sequence_length=16))
    few = [name for name, layer in result.layers.items() if layer.by_magnitude]
    note = f"{len(few)} layers of experts got fewer than {FEW_TOKENS} tokens of the text and were pruned by magnitude"
    assert few and any(note in warning for warning in result.warnings)


def test_a_layer_that_never_runs_stays_dense_and_is_said(prose) -> None:
    """Falcon-Mamba's fast path would use a projection that its slow one takes apart."""
    result = pruned_in_place("falcon_mamba", CalibrationSettings(dataset=str(prose), samples=2, sequence_length=48))
    unseen = [name for name, dense in result.left_dense.items() if dense.reason == UNSEEN]
    assert unseen == [f"backbone.layers.{block}.mixer.dt_proj" for block in (0, 1)]
