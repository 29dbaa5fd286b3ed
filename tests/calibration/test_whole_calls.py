"""Blocks that are no chain, measured as one: statistics are those of all places in which a weight is used."""

import copy

import pytest
import torch

from gblm_compress.calibration.blocks import BlockReplay, activation_norms
from gblm_compress.calibration.calls import by_block, calls_of
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import ResidentWeights
from gblm_compress.errors import ModelError
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.tiny import tiny_model
from gblm_compress.pruning.stage import prune_
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.tasks import TASKS
from tests.conftest import CAUSAL_LM, in_memory, prune, samples
from tests.families.tiny import tiny_family
from tests.tasks import families


def inputs_of(model, module, sample) -> list[torch.Tensor]:
    """What a module gets in a forward pass of the model, each time that it runs."""
    found: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(**sample)
    hook.remove()
    return found


@pytest.mark.parametrize("alpha", [0.0, 100.0])
def test_masks_of_a_block_that_repeats_are_those_of_all_its_runs(alpha: float, progress) -> None:
    """ALBERT's one block runs three times; activations by hooks, gradients by plain autograd of the cross-entropy."""
    dense = families.encoder("albert", "AutoModelForSequenceClassification")
    torch.manual_seed(0)
    texts = [
        {"input_ids": torch.randint(0, 256, (1, 24)), "attention_mask": torch.ones(1, 24, dtype=torch.long)}
        for _ in range(4)
    ]
    labelled = [{**text, "labels": torch.tensor([label % 3])} for label, text in enumerate(texts)]
    model = copy.deepcopy(dense)
    found = prune_(
        model, labelled, PruneSettings(method="gblm", alpha=alpha, allocation="uniform", fit="none"), progress
    )
    assert len(found) == 6

    masks: dict[str, list[torch.Tensor]] = {"all runs": [], "the first": []}
    for name in found:
        layer = dense.get_submodule(name)
        gradient = sum(torch.autograd.grad(dense(**sample).loss, layer.weight)[0].abs() for sample in labelled)
        runs = [inputs_of(dense, layer, text) for text in texts]
        assert {len(run) for run in runs} == {3}
        for which, count in (("all runs", 3), ("the first", 1)):
            norm = (sum(x.square().sum(0) for run in runs for x in run[:count]) / len(texts)).sqrt()
            score = layer.weight.detach().abs() * (norm + alpha * gradient)
            masks[which].append(score > score.sort(1).values[:, score.shape[1] // 2 - 1 : score.shape[1] // 2])
    kept = [model.get_submodule(name).weight != 0 for name in found]

    def wrong(which: str) -> float:
        pairs = list(zip(kept, masks[which], strict=True))
        return sum(int((one != other).sum()) for one, other in pairs) / sum(one.numel() for one in kept)

    assert wrong("all runs") <= 1e-3
    assert alpha or wrong("the first") > 1e-2


def test_a_weight_that_blocks_share_is_measured_in_all_of_them() -> None:
    model, ids = tiny_model("llama"), samples()
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    weights, calls = calls_of(ResidentWeights(model), CAUSAL_LM, ids)
    assert weights.blocks == [model.model]
    (layers,) = by_block(weights, prunable_layers(model))
    block = BlockReplay(calls, weights, in_memory(), Ranks()).block(0)
    got = activation_norms(block, layers)
    for name, users in (("layers.0.mlp.up_proj", (first, second)), ("layers.1.mlp.gate_proj", (second,))):
        squares = [x.square().sum(0) for module in users for sample in ids for x in inputs_of(model, module, sample)]
        torch.testing.assert_close(got[f"model.{name}"], (sum(squares) / len(ids)).sqrt(), rtol=1e-4, atol=1e-5)


def test_what_is_around_the_blocks_is_the_innermost_module_that_runs_once() -> None:
    """ALBERT's classifier reads what a pooler makes of the encoder's output; HRM repeats the module of its blocks."""
    embedder, classifier = (
        families.encoder("albert", TASKS[task].auto_class) for task in ("embedding", "classification")
    )
    ids = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples()]
    for model, encoder in ((embedder, embedder.encoder), (classifier, classifier.albert.encoder)):
        assert calls_of(ResidentWeights(model), TASKS["embedding"], ids)[0].blocks == [encoder]
    loop = tiny_family("hrm_text")
    assert calls_of(ResidentWeights(loop), CAUSAL_LM, samples())[0].blocks == [loop.model]


def test_a_block_that_repeats_is_not_pruned_from_disk(tmp_path, progress) -> None:
    dense = families.written(tmp_path / "albert", "albert")
    text = CalibrationSettings(dataset="demo", samples=2, sequence_length=32)
    with pytest.raises(ModelError, match="block 0 runs more than once; such a model is pruned in memory as a whole"):
        prune(
            dense, tmp_path / "out", PruneSettings(method="wanda", fit="none"), text,
            resources=ResourceSettings(offload=True), device="cpu", progress=progress,
        )  # fmt: skip
