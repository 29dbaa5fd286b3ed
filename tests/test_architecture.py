import pytest
import torch
from torch import nn

from gblm_compress.architecture import check_finite, find_blocks, prunable_layers, weight_matrix
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.tiny import tiny_model
from tests.conftest import ARCHITECTURES

LAYERS_PER_BLOCK = {"llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gpt2": 4, "opt": 6}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_linear_layers_of_the_blocks_and_nothing_else(kind: str) -> None:
    model = tiny_model(kind)
    layers = prunable_layers(model)
    assert [len(block) for block in layers] == [LAYERS_PER_BLOCK[kind]] * 2
    names = [name for block in layers for name in block]
    assert not [name for name in names if "head" in name or "embed" in name or name.endswith(("wte", "wpe"))]
    for name in names:
        assert model.get_submodule(name) is next(block[name] for block in layers if name in block)


def test_conv1d_is_seen_as_out_by_in() -> None:
    layer = tiny_model("gpt2").transformer.h[0].mlp.c_fc
    matrix = weight_matrix(layer)
    assert matrix.shape == (256, 64)
    assert matrix.data_ptr() == layer.weight.data_ptr()


def test_targets_and_ignore_select_by_name() -> None:
    model = tiny_model("llama")
    layers = prunable_layers(model, targets=("*.mlp.*",), ignore=("*.0.mlp.down_proj", "lm_head"))
    assert [sorted(name.rpartition(".")[2] for name in block) for block in layers] == [
        ["gate_proj", "up_proj"],
        ["down_proj", "gate_proj", "up_proj"],
    ]


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(UsageError, match=rf"{option} pattern '\*\.ffn\.\*' matches no module.*model\.layers\.0\."):
        prunable_layers(tiny_model("llama"), **{option: ("*.ffn.*",)})


def test_nothing_left_to_prune_is_an_error() -> None:
    with pytest.raises(ModelError, match="no prunable layer is left"):
        prunable_layers(tiny_model("llama"), targets=("lm_head",))


def test_routers_are_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    assert list(prunable_layers(model)[0]) == ["layers.0.up"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no prunable layer"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_values_that_are_not_finite_are_named() -> None:
    with pytest.raises(ModelError, match=r"layers\.3: 2 of 4 weights are NaN or infinite"):
        check_finite("layers.3", "weights", torch.tensor([1.0, float("nan"), float("inf"), 0.0]))
