"""Experts as layers, against the fused modules of transformers."""

import pytest
import torch
from torch import nn

from gblm_compress.models.architecture import linear_weights, prunable_layers
from gblm_compress.models.experts import FORMS, experts_of, form_of, fused_weights, unfuse_, unfused
from tests.families.tiny import tiny_family

# Every form of its own, and of the common one: gated, transposed with biases, without a gate.
KINDS = ("mixtral", "gpt_oss", "nemotron_h", "dbrx", "inkling_text", "jetmoe", "llama4_text", "longcat_flash")


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_the_fused_ones_do(kind: str, monkeypatch) -> None:
    model = tiny_family(kind)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = torch.arange(48).view(2, 24)
    expected = model(input_ids=ids, use_cache=False).logits
    expected.square().sum().backward()
    fused = dict(model.named_parameters())
    with unfused(model):
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        for name, (whole, view) in fused_weights(model).items():
            own = model.get_parameter(name)
            assert torch.equal(view(fused[whole]), own) and view(fused[whole]).data_ptr() == own.data_ptr()
            torch.testing.assert_close(own.grad, view(fused[whole].grad))
        assert experts_of(model) and not any(form_of(module) for module in model.modules())
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
        with monkeypatch.context() as traced:  # then every expert runs on every token
            traced.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
        next(iter(experts_of(model).values())).layers(0)[-1].weight.data.zero_()
    assert not experts_of(model), "the fused modules are back"
    changed = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(changed, expected), "what is written into a layer is written into the fused parameter"


def test_every_form_is_tried() -> None:
    classes = {type(module).__name__ for kind in KINDS for module in tiny_family(kind).modules()}
    assert FORMS.keys() <= classes


def test_experts_are_prunable_and_routers_are_told_by_their_outputs() -> None:
    """A router may have any name; it lies beside the experts and has an output for each."""
    model = tiny_family("qwen2_moe")
    mixture = model.model.layers[0].mlp
    mixture.chooser, mixture.wide = nn.Linear(64, 4), nn.Linear(64, 5)
    unfuse_(model)
    layers = {name for block in prunable_layers(model) for name in block}
    assert {f"model.layers.1.mlp.experts.{e}.{p}" for e in range(4) for p in ("gate_up_proj", "down_proj")} < layers
    reasons = {name.removeprefix("model.layers.0.mlp."): reason for name, _, reason in linear_weights(model)}
    assert reasons["gate.weight"] == reasons["shared_expert_gate"] == reasons["chooser"] == "router"
    assert reasons["wide"] is None
