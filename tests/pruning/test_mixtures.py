"""Pruning of mixtures of experts, against loops over the fused experts of transformers."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from gblm_compress.pruning.block_pruning import FEW_TOKENS
from gblm_compress.pruning.stage import PruneResult
from gblm_compress.pruning.walk import UNSEEN
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from tests.conftest import prune, prune_, samples, saved
from tests.families.tiny import tiny_family

EXPERTS = "model.layers.0.mlp.experts"


def routed(model, ids) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each sample, (inputs of the first block's experts [tokens, width], the experts of each [tokens, k])."""
    found = []
    hook = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda module, args: found.append(args[:2]))
    with torch.no_grad():
        for sample in ids:
            model(input_ids=sample["input_ids"], use_cache=False)
    hook.remove()
    return found


def slow_norms(model, ids, expert: int) -> torch.Tensor:
    """A of one expert's first layer, token by token."""
    total = torch.zeros(64)
    for x, index in routed(model, ids):
        for token, chosen in zip(x, index, strict=True):
            if expert in chosen.tolist():
                total += token.square()
    return (total / len(ids)).sqrt()


def slow_gradients(model, ids) -> torch.Tensor:
    """Σ |g| of the fused parameter of the first block, from whole backward passes."""
    fused = model.get_parameter(f"{EXPERTS}.gate_up_proj")
    total = torch.zeros_like(fused)
    for sample in ids:
        model.zero_grad()
        tokens = sample["input_ids"]
        cross_entropy(model(input_ids=tokens, use_cache=False).logits[0, :-1], tokens[0, 1:]).backward()
        total += fused.grad.abs()
    return total


def test_masks_are_those_of_a_loop_over_tokens_and_experts() -> None:
    model, ids = tiny_family("mixtral"), samples(3, 64)
    model.set_experts_implementation("eager")
    dense = model.get_parameter(f"{EXPERTS}.gate_up_proj").detach().clone()
    norms = [slow_norms(model, ids, expert) for expert in range(4)]
    gradients = slow_gradients(model, ids)
    results = prune_(model, ids, method="gblm", allocation="uniform")
    pruned = model.get_parameter(f"{EXPERTS}.gate_up_proj")
    for expert in range(4):
        assert not results[f"{EXPERTS}.{expert}.gate_up_proj"].by_magnitude
        for row, weights in enumerate(dense[expert]):
            score = weights.abs() * (norms[expert] + 100 * gradients[expert, row])
            kept = set(score.argsort(descending=True)[:32].tolist())
            assert set(pruned[expert, row].nonzero().flatten().tolist()) == kept


def test_an_expert_with_few_tokens_goes_by_magnitude() -> None:
    model, ids = tiny_family("mixtral"), samples(2, 32)
    dense = model.get_parameter(f"{EXPERTS}.gate_up_proj").detach().clone()
    got = [sum(int((index == expert).sum()) for _, index in routed(model, ids)) for expert in range(4)]
    assert min(got) < FEW_TOKENS <= max(got), "the seed gives both kinds"
    results = prune_(model, ids, method="wanda")
    pruned = model.get_parameter(f"{EXPERTS}.gate_up_proj")
    for expert, tokens in enumerate(got):
        assert results[f"{EXPERTS}.{expert}.gate_up_proj"].by_magnitude == (tokens < FEW_TOKENS)
        largest = dense[expert].abs().topk(32).indices.sort().values
        kept = torch.stack([row.nonzero().flatten() for row in pruned[expert]])
        assert torch.equal(largest, kept) == (tokens < FEW_TOKENS)


def on_disk(family: str, folder: Path) -> Callable[..., PruneResult]:
    """A tiny model of a family in a folder, and a function that prunes it."""
    source = saved(tiny_family(family), folder / "dense")
    (folder / "text.txt").write_text("some text of letters " * 40)

    def run(name: str, count: int, length: int, offload=None, **settings) -> PruneResult:
        dataset = str(folder / "text.txt")
        text = CalibrationSettings(dataset=dataset, samples=count, sequence_length=length)
        chosen = PruneSettings(**{"method": "wanda", "fit": "none"} | settings)
        return prune(source, folder / name, chosen, text, resources=ResourceSettings(offload=offload))

    return run


def test_experts_with_few_tokens_are_named(tmp_path) -> None:
    result = on_disk("mixtral", tmp_path)("few", 2, 16)
    few = [name for name, layer in result.layers.items() if layer.by_magnitude]
    note = f"{len(few)} layers of experts got fewer than {FEW_TOKENS} tokens of the text and were pruned by magnitude"
    assert few and any(note in warning for warning in result.warnings)


def test_offload_prunes_experts_to_the_same_bits(tmp_path) -> None:
    run = on_disk("qwen3_moe", tmp_path)
    for offload in (False, True):
        run(str(offload), 3, 64, offload=offload, method="gblm", fit="fast")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("False", "True")]
    assert files[0] == files[1]


def test_a_layer_that_never_runs_stays_dense_and_is_said(tmp_path) -> None:
    """Falcon-Mamba's fast path would use a projection that its slow one takes apart."""
    result = on_disk("falcon_mamba", tmp_path)("out", 2, 48)
    unseen = [name for name, dense in result.left_dense.items() if dense.reason == UNSEEN]
    assert unseen == [f"backbone.layers.{block}.mixer.dt_proj" for block in (0, 1)]
