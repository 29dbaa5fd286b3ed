"""A model whose blocks come from disk one at a time, against the same model in memory."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from gblm_compress.calibration.weights import HiddenStates, StatePool, StreamedWeights, show_, tie_of
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.models.loading import load_model, load_skeleton
from tests.conftest import ARCHITECTURES, saved
from tests.families.tiny import tiny_family


def test_only_the_part_at_work_has_weights_and_changes_to_it_do_not_last(tiny) -> None:
    before = {path.name: path.read_bytes() for path in tiny("llama").folder.iterdir()}
    streamed = StreamedWeights(tiny("llama"), load_skeleton(tiny("llama")), "cpu")
    for _ in range(2):
        with streamed.block(1) as block:
            real = [name for name, parameter in streamed.model.named_parameters() if not parameter.is_meta]
            assert real and all(name.startswith("model.layers.1.") for name in real)
            assert block.mlp.up_proj.weight.count_nonzero() > 0
            with torch.no_grad():
                block.mlp.up_proj.weight.zero_()
    with streamed.outer():
        assert not streamed.model.model.norm.weight.is_meta
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert {path.name: path.read_bytes() for path in tiny("llama").folder.iterdir()} == before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # a file has a tensor for each expert, or one for all
def test_changes_to_experts_do_not_last_either(family: str, tmp_path: Path) -> None:
    source = saved(tiny_family(family), tmp_path)
    streamed = StreamedWeights(source, load_skeleton(source), "cpu")
    for _ in range(2):
        with streamed.block(0) as block, torch.no_grad():
            weights = [
                layer.weight for expert in range(4) for layer in getattr(block.mlp.experts, str(expert)).values()
            ]
            assert weights and all(weight.count_nonzero() > 0 for weight in weights)
            for weight in weights:
                weight.zero_()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attached_matrices_stay_on_disk_and_the_model_computes_the_same(kind: str, tiny) -> None:
    ids, dense = torch.arange(12)[None], load_model(tiny(kind), "float32")
    model = load_skeleton(tiny(kind), "float32")
    StreamedWeights(tiny(kind), model, "cpu").attach_(torch.float16)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert held == sum(parameter.numel() for parameter in dense.parameters() if parameter.dim() == 1)
    for parameter in dense.parameters():
        parameter.data = parameter.data.half().float()
    assert torch.equal(model(ids).logits, dense(ids).logits)
    head, embedding = head_and_embedding(model)
    assert (tie_of(head) == tie_of(embedding)) == dense.config.tie_word_embeddings
    rows = torch.full_like(embedding.weight, 0.5)
    show_(embedding, Mock(dense_weight=lambda: rows))
    assert torch.equal(embedding.weight, rows)
    assert torch.equal(head.weight, rows) == dense.config.tie_word_embeddings


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "qwen3_moe"])
@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "2:4"},
        {"method": "wanda", "allocation": "sensitivity", "dtype": "bfloat16"},
        {"method": "gradient", "allocation": "sensitivity"},
        {"method": "regional", "fit": "fast", "pattern": "2:4"},
        {"method": "magnitude"},
        {"method": "obs", "fit": "balanced", "pattern": "2:4"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)  # fmt: skip
def test_pruning_from_disk_gives_the_same_bytes(kind, settings, pruning, tmp_path) -> None:
    folders, source = [], kind if kind in ARCHITECTURES else saved(tiny_family(kind), tmp_path / "dense")
    for offload, memory in ((False, None), (True, 1)):  # with one byte of memory every hidden state is a file, too
        pruning(str(offload), source, offload=offload, memory=memory, **settings)
        folders.append({path.name: path.read_bytes() for path in (tmp_path / str(offload)).iterdir()})
    assert folders[0] == folders[1]


@pytest.mark.parametrize("room", [1200, 1199])  # of three states of 400 bytes; whole or not at all
def test_states_are_given_back_when_they_are_released(room: int, tmp_path: Path) -> None:
    pool = StatePool(tmp_path, room, torch.device("cpu"))
    states = HiddenStates(pool, 3)
    tensors = [torch.randn(1, 10, 10) for _ in range(3)]
    for index, tensor in enumerate(tensors):
        states[index] = tensor
    assert (pool.left, len(list(tmp_path.iterdir()))) == ((0, 0) if room == 1200 else (1199, 3))
    assert all(torch.equal(got, tensor) for got, tensor in zip(states, tensors, strict=True))
    states[2] = tensors[0]
    assert torch.equal(states[2], tensors[0]) and torch.equal(states[1], tensors[1])
    states.release()
    assert pool.left == room and not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [12, 11])
def test_what_is_put_away_comes_back_from_memory_or_a_file(room: int, tmp_path: Path) -> None:
    pool = StatePool(tmp_path, room, torch.device("cpu"))
    with pool.put_away([torch.arange(2.0), torch.ones(2, dtype=torch.bfloat16)]) as get:
        assert (pool.left, len(list(tmp_path.iterdir()))) == ((0, 0) if room == 12 else (11, 1))
        assert get(1).dtype is torch.bfloat16 and get(0).tolist() == [0, 1]
    assert pool.left == room and not list(tmp_path.iterdir())
