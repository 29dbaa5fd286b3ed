"""What a training keeps: survivors alone, each on one process; and gradients with blocks that run again."""

import copy

import pytest
import torch

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.mask_rules import MASK_RULES
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.tiny import tiny_model
from gblm_compress.recovery.checkpointing import checkpointed
from gblm_compress.recovery.survivors import Survivors
from gblm_compress.recovery.weights import Weights, _owners, bytes_a_weight
from gblm_compress.settings import RecoverSettings

IDS = torch.arange(24)[None]


def student(kind: str = "llama"):
    """A tiny model, half of its weights zero; and its layers."""
    model = tiny_model(kind)
    layers = {f"{name}.weight": layer for block in prunable_layers(model) for name, layer in block.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < 0.5)
    return model, layers


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_survivors_are_packed_in_order_and_put_back() -> None:
    places = torch.tensor([[True, False, False], [False, True, True]])
    dense = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    packed = Survivors(places).pack(dense).requires_grad_()
    assert packed.tolist() == [1, 5, 6]
    back = Survivors(places).unpack(packed)
    assert torch.equal(back, torch.where(places, dense, 0.0))
    (back * dense).sum().backward()
    assert packed.grad.tolist() == [1, 5, 6]
    assert Survivors().pack(dense) is Survivors().unpack(dense) is dense


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6), (2, 40_000)])  # the last has columns that 16 bits do not number
@pytest.mark.parametrize("in_each_row", [None, 2, 0])
def test_survivors_are_those_of_the_mask(shape, in_each_row: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, dense = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    places = drawn < 0.3 if in_each_row is None else drawn.argsort(-1).argsort(-1) < in_each_row
    if in_each_row is None:
        places[0] = False  # a row without survivors
    survivors = Survivors(places)
    assert torch.equal(survivors.pack(dense), dense.masked_select(places))
    assert torch.equal(survivors.unpack(dense.masked_select(places)), dense * places)


def test_masters_are_survivors_and_get_the_sum_of_all_windows_gradients() -> None:
    for kind in ("llama", "gpt2"):  # whose layers are stored transposed
        model, layers = student(kind)
        weights = Weights(copy.deepcopy(model), {}, {}, MASK_RULES["fixed"], torch.float32, Ranks())
        assert set(weights.parameters) == {
            n for n, _ in model.named_parameters() if "wte" not in n and "embed" not in n
        }
        expected = {name: 2 * gradient for name, gradient in gradients(model).items()}
        masks = {name: layer.weight.detach() != 0 for name, layer in layers.items()}
        model.zero_grad()
        weights = Weights(model, layers, {}, MASK_RULES["fixed"], torch.float32, Ranks())
        for _ in range(2):
            model(IDS, use_cache=False).logits.square().mean().backward()
        assert all(parameter.grad is None for parameter in weights.parameters.values())
        weights.pass_gradients()
        for name, master in weights.masters.items():
            dense = expected[name][masks[name]] if name in layers else expected[name]
            assert torch.equal(master.grad, dense), name


def test_the_network_has_the_dtype_of_products_in_pruned_layers_alone() -> None:
    model, layers = student()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Weights(model, layers, {}, MASK_RULES["fixed"], torch.bfloat16, Ranks())
    for name, parameter in model.named_parameters():
        dtype = torch.bfloat16 if name in layers else torch.float32
        assert parameter.dtype == dtype and torch.equal(parameter, before[name].to(dtype)), name


def test_each_tensor_is_on_one_process_and_all_have_about_as_much() -> None:
    sizes = {"a": 10, "b": 7, "c": 6, "d": 3, "e": 2}
    owner = _owners(sizes, 2)
    assert [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in (0, 1)] == [15, 13]
    shares = []
    for rank in (0, 1):
        model, layers = student()
        ranks = Ranks(rank, 2)
        ranks.send_ = lambda tensor, owner: None  # no other process is there
        shares.append(set(Weights(model, layers, {}, MASK_RULES["sr-ste"], torch.float32, ranks).masters))
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == {name for name, _ in model.named_parameters() if "embed" not in name}


def test_the_bytes_of_a_weight_are_those_of_the_documentations_table() -> None:
    fixed, learned = (RecoverSettings(fit_dtype="bfloat16", mask=mask) for mask in ("fixed", "sr-ste"))
    dense = 2
    assert [bytes_a_weight(fixed, 0.5, n) + dense for n in (1, 2, 4)] == [13, 10, 8.5]
    assert [bytes_a_weight(learned, 0.5, n) + dense for n in (1, 2, 4)] == [26, 17, 12.5]
    assert bytes_a_weight(RecoverSettings(fit_dtype="float32"), 0.5, 1) == 13


def test_blocks_that_run_again_give_the_same_gradients() -> None:
    model, _ = student()
    expected, runs = gradients(model), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    with checkpointed(model):
        got = gradients(model)
    assert len(runs) == 2
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name
    gradients(model)
    assert len(runs) == 3
