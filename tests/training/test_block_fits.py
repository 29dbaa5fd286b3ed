"""Fits of surviving weights: the loop itself, blocks against the dense model, whole models against its predictions."""

import math
from functools import partial

import pytest
import torch

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.fits import BLOCK_EPOCHS, BLOCK_RATE
from gblm_compress.methods.quantisation import make_grid, rounded, straight_through
from gblm_compress.methods.zeros import has_negative_zeros
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.pruning.block_pruning import BlockFit, prune_block_
from gblm_compress.settings import PruneSettings
from gblm_compress.training.fits import How, distil_, reconstruct_, relative_error
from gblm_compress.training.imitation import Imitation, prediction
from gblm_compress.training.trainer import Trainer
from gblm_compress.training.weights import SCALE_RATE, Weights, write_
from tests.conftest import CAUSAL_LM, divergence, in_memory, prune_, replay, samples, tiny_model


def fit(start: torch.Tensor, loss, samples: int, *, epochs: int, rate: float, grids=None, revive: bool = False):
    """A fit of one layer with a row of weights: the weights, factors of their scales, the best look, and the curve."""
    layer = torch.nn.Linear(len(start), 1, bias=False)
    layer.weight.data.copy_(start)
    weights = Weights({"w": layer}, grids or {}, revive=revive)
    plan = How(epochs, rate, "float32").plan(samples, "fit", Ranks())
    found = Trainer(layer, weights, lambda some: loss(layer.weight[0], *some), plan).run()
    values, factors = weights.values["w"]
    return values[0], factors, found.best, [look.held_out for look in found.curve]


def by_adam(trained: dict[torch.Tensor, float], steps: int, gradients) -> None:
    """Train {tensor: its highest rate} on what `gradients(step)` leaves in them."""
    adam = torch.optim.Adam([{"params": [one], "lr": rate} for one, rate in trained.items()], betas=(0.9, 0.95))
    warm_up = max(1, steps // 10)
    for step in range(steps):
        adam.zero_grad()
        gradients(step)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
        for group, rate in zip(adam.param_groups, trained.values(), strict=True):
            group["lr"] = rate * ((step + 1) / warm_up if step < warm_up else cosine)
        adam.step()


def size(values: torch.Tensor) -> float:
    return float(values[values != 0].square().mean().sqrt())


def line(count: int, scale: float = 1.0):
    """Points of y = Xw with w sparse, and the squared error of a weight on each."""
    generator = torch.Generator().manual_seed(0)
    truth = scale * torch.tensor([1.0, 0.0, -2.0, 0.0])
    points = torch.randn(count, 5, 4, generator=generator)
    return truth, lambda weight, index: (points[index] @ (weight - truth)).square().mean()


@pytest.mark.parametrize(("count", "scale"), [(17, 1e-3), (17, 1.0), (17, 1e3), (8, 1.0), (2, 1.0), (1, 1.0)])
def test_fit_finds_the_minimum_at_any_scale_and_keeps_zeros(count: int, scale: float) -> None:
    truth, loss = line(count, scale)
    fitted, _, best, curve = fit(truth * 1.5, loss, count, epochs=40, rate=0.02)
    assert curve[best] < curve[0] and 0 < best <= 40 and not fitted[truth == 0].any()
    if count == 17:
        torch.testing.assert_close(fitted, truth, rtol=0.02, atol=0)


def test_weights_that_a_fit_would_harm_are_returned_as_they_were() -> None:
    """Held-out samples want the opposite of the others: early stopping must keep the start."""
    start, seen = torch.tensor([1.0, 0.0]), []

    def loss(weight, index):
        seen.append(index)
        return weight.square().sum() if index % 8 == 7 else -weight.sum()

    fitted, _, best, curve = fit(start, loss, 16, epochs=50, rate=0.1)
    assert torch.equal(fitted, start)
    assert (best, curve[0]) == (0, 1.0)
    assert len(seen) < 4 * 16  # it gave up early


def test_pruned_weights_gather_the_steps_of_a_straight_through_estimator() -> None:
    """The oracle takes the zeros into the loss by autograd: v + (v·mask − v), the bracket without a gradient."""
    _, loss = line(9)  # the 8th sample is held out
    start = torch.tensor([3.0, -2.0, 0.0, 0.0])
    mask = start != 0
    oracle = start.clone().requires_grad_()
    order = [index if index < 7 else 8 for index in torch.randperm(8, generator=torch.Generator().manual_seed(0))]

    def gradients(step: int) -> None:
        for index in order[2 * step : 2 * step + 2]:
            (loss(oracle + (oracle * mask - oracle).detach(), index) / 2).backward()

    by_adam({oracle: 0.02 * size(start)}, 4, gradients)
    fitted, _, best, _ = fit(start, loss, 9, epochs=1, rate=0.02, revive=True)
    assert best == 1
    torch.testing.assert_close(fitted, oracle.detach())
    assert fitted[2] < -0.01  # the truth is -2, and the weight was pruned
    alone, _, _, _ = fit(start, loss, 9, epochs=1, rate=0.02)
    torch.testing.assert_close(fitted * mask, alone)


def test_weights_and_scales_of_a_grid_are_fitted_as_autograd_says() -> None:
    """Against a loop over the straight-through estimate of a layer whose samples are all alike."""
    truth, _ = line(1)
    start = torch.tensor([[3.0, 0.0, -2.1, 0.0]])
    grid = make_grid(start, start != 0, "int8", None)

    def loss(weight, index=0):
        return (weight.flatten() - truth).square().sum()

    values, factors, best, _ = fit(start[0], loss, 3, epochs=2, rate=0.02, grids={"w": grid})
    masters = [start.clone().requires_grad_(), torch.ones_like(grid.scales.float()).requires_grad_()]

    def gradients(step: int) -> None:  # of two samples; the third is held out
        loss(straight_through(masters[0], 1 + SCALE_RATE * (masters[1] - 1), grid)).backward()
        masters[0].grad *= start != 0

    by_adam(dict(zip(masters, (0.02 * size(start), 0.02), strict=True)), 2, gradients)
    assert best == 2
    torch.testing.assert_close(values, masters[0][0].detach())
    torch.testing.assert_close(factors, masters[1].detach())


def test_a_layer_without_survivors_stays_empty() -> None:
    fitted, _, best, _ = fit(torch.zeros(3), lambda weight, index: weight.sum() + 1, 3, epochs=2, rate=0.1)
    assert torch.equal(fitted, torch.zeros(3)) and best == 0


def test_relative_error_weighs_every_token_alike() -> None:
    target = torch.tensor([[[1.0, 0.0], [1000.0, 0.0]]])
    small, huge = torch.zeros_like(target), torch.zeros_like(target)
    small[0, 0, 1], huge[0, 1, 1] = 0.1, 100.0
    assert float(relative_error(target + small, target)) == pytest.approx(0.005)
    assert float(relative_error(target + huge, target)) == pytest.approx(0.005)


def pruned_block(kind: str, compute: str = "float32", **settings):
    """The first block at 2:4: its error on held-out samples, its layers and their grids."""
    model, dense = tiny_model(kind), tiny_model(kind)
    block, layers = replay(model, samples(16, 48)).block(0), prunable_layers(model)[0]
    targets = [block.run(index) for index in range(16)]
    chosen = PruneSettings(pattern="2:4", **settings)
    how = How(BLOCK_EPOCHS, BLOCK_RATE, compute, chosen.rounds)
    run, pool = partial(reconstruct_, targets=targets, how=how), in_memory()
    fit = BlockFit(run, pool.put_away) if chosen.fits.fits_block else None
    results, grids = prune_block_(block, layers, {}, chosen, chosen.budgets(list(layers)), fit)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        assert name.removesuffix(".weight") in layers or torch.equal(parameter, dense.get_parameter(name))
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach().contiguous()
        assert int((weight != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2 and not has_negative_zeros(weight)
        assert results[name].nonzeros == int((weight != 0).sum())
    error = sum(float(relative_error(block.run(index), targets[index])) for index in (7, 15)) / 2
    return error, layers, grids


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["wanda", "obs"])
def test_rounds_of_reconstruction_choose_other_masks_and_never_end_worse(kind: str, method: str) -> None:
    errors, masks = [], []
    for rounds in (1, 2, 3):
        error, layers, _ = pruned_block(kind, method=method, fit="balanced", rounds=rounds)
        errors.append(error)
        masks.append([layer.weight != 0 for layer in layers.values()])
    assert errors[1] < errors[0] and errors[2] <= errors[1] * (1 + 1e-6)
    assert any(not torch.equal(one, other) for one, other in zip(masks[0], masks[1], strict=True))


def on_grids(layers, grids) -> bool:
    weights = {name: weight_matrix(layer).detach() for name, layer in layers.items()}
    return all(torch.equal(weights[name], rounded(weights[name], weights[name] != 0, grids[name])) for name in weights)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("compute", "chosen"), [("float32", {}), ("bfloat16", {}), ("float32", {"quantise": "int4", "group": 32})]
)
def test_a_fit_lowers_the_error_of_a_block_through_its_grids(kind: str, compute: str, chosen) -> None:
    fast, balanced = (pruned_block(kind, compute, method="wanda", fit=fit, **chosen) for fit in ("fast", "balanced"))
    assert balanced[0] < 0.98 * fast[0]
    for name, layer in fast[1].items():
        assert chosen or torch.equal(layer.weight != 0, balanced[1][name].weight != 0)
    for _, layers, grids in (fast, balanced) if chosen else ():
        assert on_grids(layers, grids)
    assert all(not torch.equal(balanced[2][name].scales, grid.scales) for name, grid in fast[2].items())


@pytest.mark.parametrize(
    ("kind", "dtype", "how", "factor"),
    [
        ("llama", torch.float32, How(4, 0.02, "float32"), 0.95),
        ("gpt2", torch.float32, How(4, 0.02, "float32"), 0.95),
        ("llama", torch.bfloat16, How(3, 1e-3, "float32"), 1.0),  # steps far below its resolution must add up
        ("quantised", torch.float32, How(4, 0.02, "float32"), 0.98),
    ],
)
def test_distillation_lowers_the_divergence_on_unseen_samples(kind, dtype, how: How, factor, progress) -> None:
    ids, unseen = samples(16, 48), samples(4, 48, seed=5)
    dense, pruned = (tiny_model(kind.replace("quantised", "llama")).to(dtype) for _ in range(2))
    prune_(pruned, ids, method="wanda", pattern="2:4")
    layers = {name: layer for block in prunable_layers(pruned) for name, layer in block.items()}
    grids = {}
    for name, layer in layers.items() if kind == "quantised" else ():
        weight = layer.weight.detach()
        grids[name] = make_grid(weight, weight != 0, "int4", 32, torch.ones(weight.shape[1]))
        write_(layer, weight, grids[name])
    masks, before = {name: layer.weight != 0 for name, layer in layers.items()}, divergence(dense, pruned, unseen)
    teacher = [prediction(dense, CAUSAL_LM, [sample]) for sample in ids]
    loss = Imitation(pruned, CAUSAL_LM, ids, lambda some: teacher[some[0]], "float32")
    fitted = distil_(layers, loss, how, grids, Ranks(), progress)
    assert divergence(dense, pruned, unseen) < factor * before
    for name, layer in layers.items():
        assert layer.weight.dtype == dtype and not has_negative_zeros(layer.weight.detach())
        assert torch.equal(layer.weight != 0, masks[name]) or grids
    assert torch.equal(pruned.get_output_embeddings().weight, dense.get_output_embeddings().weight)
    assert all(p.requires_grad for p in pruned.parameters())
    assert not grids or on_grids(layers, fitted)
    assert all(not torch.equal(fitted[name].scales, grid.scales) for name, grid in grids.items())


def test_gradients_too_small_for_float16_reach_the_masters_of_its_layers() -> None:
    ids, model = samples(8, 48), tiny_model("llama").half()
    block, layers = replay(model, ids).block(0), prunable_layers(model)[0]
    stored = {name: layer.weight.data_ptr() for name, layer in layers.items()}
    targets = [block.run(index) for index in range(len(ids))]
    for layer in layers.values():
        layer.weight.data *= layer.weight.abs() > layer.weight.abs().median()
    before = relative_error(block.run(7), targets[7])  # the 8th sample is held out
    seen = []
    next(iter(layers.values())).register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.dtype))
    reconstruct_(block, layers, targets, How(3, 0.01, "bfloat16"), {}, None)
    assert set(seen) == {torch.float32} and relative_error(block.run(7), targets[7]) < 0.95 * before
    for name, layer in layers.items():
        assert layer.weight.dtype is torch.float16 and layer.weight.data_ptr() == stored[name]
