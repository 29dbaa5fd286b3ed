import re
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.models.architecture import find_blocks, linear_weights, prunable_layers
from tests.conftest import ARCHITECTURES, tiny_model
from tests.families.tiny import tiny_family

# Families that name and build their routers differently.
ROUTERS = {
    "mixtral": {"*.mlp.gate.weight"},
    "qwen2_moe": {"*.mlp.gate.weight", "*.mlp.shared_expert_gate"},
    "hunyuan_v1_moe": {"*.mlp.gate.wg"},
    "jetmoe": {"*.mlp.router.layer", "*.experts.router.layer"},
    "longcat_flash": {"*.mlp.router.classifier"},
    "zaya": {"*.mlp.gate.down_proj", "*.gate.router_mlp.fc?", "*.gate.router_mlp.out_proj"},
    "llama4_text": {"*.feed_forward.router"},
}
LAYERS_PER_BLOCK = {"llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gpt2": 4, "opt": 6}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_linear_layers_of_the_blocks_and_nothing_else(kind: str) -> None:
    model = tiny_model(kind)
    layers = prunable_layers(model)
    assert [len(block) for block in layers] == [LAYERS_PER_BLOCK[kind]] * 2
    for name, layer in {**layers[0], **layers[1]}.items():
        assert model.get_submodule(name) is layer and not re.search(r"head|embed|wte|wpe", name)


def test_ignore_selects_by_name_and_must_match_something_but_not_everything() -> None:
    model = tiny_model("llama")
    first, second = prunable_layers(model, ignore=("*.self_attn.*", "*.0.mlp.down_proj", "lm_head"))
    assert first.keys() == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")}
    assert second.keys() == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    with pytest.raises(UsageError, match=r"ignore pattern '\*\.ffn\.\*' matches no module.*model\.layers\.0\."):
        prunable_layers(model, ignore=("*.ffn.*",))
    with pytest.raises(ModelError, match="no prunable layer is left"):
        prunable_layers(model, ignore=("model.*",))


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_are_left_alone(kind: str) -> None:
    model = tiny_family(kind)
    listed = linear_weights(model)
    found = {name for name, _, reason in listed if reason == "router"}
    assert all(any(fnmatchcase(name, router) for router in ROUTERS[kind]) for name in found)
    assert all(any(fnmatchcase(name, router) for name in found) for router in ROUTERS[kind])
    pruned = {name for block in prunable_layers(model) for name in block}
    assert pruned == {name for name, _, reason in listed if reason is None}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if name.endswith("gate_proj")} <= pruned, "an ordinary gated MLP is no router"
    assert any(reason == "fused experts (3-D parameter)" for _, _, reason in listed)


@pytest.mark.parametrize("router", ["gate", "MoEGate", "DeepseekTopkRouter", "TopKGate"])
def test_a_router_is_told_by_its_name_or_its_class(router: str) -> None:
    chooser = type(router, (nn.ModuleDict,), {})({"inner": nn.Linear(4, 4)})
    block = {"gate" if router == "gate" else "choose": chooser, "up": nn.Linear(4, 4), "gate_up": nn.Linear(4, 4)}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(block)])})
    assert list(prunable_layers(model)[0]) == ["layers.0.up", "layers.0.gate_up"]


def test_every_linear_weight_is_listed_with_why_it_is_not_pruned() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.weight.T if self.bias is None else hidden @ self.weight.T + self.bias

    model = tiny_model("llama")
    model.project = nn.Linear(3, 5)
    model.model.layers[0].mlp.scaled = Scaled(3, 7)
    model.model.layers[0].mlp.renamed = Renamed(3, 7)
    found = {name: (size, reason) for name, size, reason in linear_weights(model, ignore=("*.0.mlp.down_proj",))}
    assert len(found) == 18
    assert found["lm_head"] == (257 * 64, "embedding tied")
    assert found["model.layers.0.mlp.down_proj"] == (128 * 64, "ignored by pattern '*.0.mlp.down_proj'")
    assert found["model.layers.1.mlp.down_proj"] == (128 * 64, None)
    assert found["project"] == (15, "outside the blocks")
    assert found["model.layers.0.mlp.scaled"] == (21, "layer of type Scaled")
    assert found["model.layers.0.mlp.renamed"] == (21, None)
    assert ("lm_head", 257 * 64, "head") in linear_weights(tiny_model("qwen2"))
    assert ("transformer.h.0.mlp.c_fc", 64 * 256, None) in linear_weights(tiny_model("gpt2"))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no prunable layer"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))
