"""Mask rules against loops over single weights."""

import math

import pytest
import torch

from gblm_compress.methods.mask_rules import EXCHANGED, LAST_EXCHANGE, MASK_RULES, Layer, Moment
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.proximal import proximal

ALWAYS = Moment(step=9, steps=100, every=10)
POWER = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)).clone


def numbers(rows: int = 6, columns: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    keep = torch.rand(rows, columns, generator=generator) < 0.5
    return weight, gradient, keep


@pytest.mark.parametrize("name", ["sr-ste", "exchange"])
def test_the_network_sees_the_mask_and_its_gradient_passes_to_all(name) -> None:
    weight, gradient, keep = numbers()
    leaf = weight.clone().requires_grad_()
    seen = MASK_RULES[name].seen(leaf, keep)
    assert torch.equal(seen.detach(), torch.where(keep, weight, 0.0))
    (seen * gradient).sum().backward()
    assert torch.equal(leaf.grad, gradient)


def test_a_fixed_mask_moves_survivors_alone() -> None:
    weight, gradient, keep = numbers()
    rule = MASK_RULES["fixed"]
    assert torch.equal(rule.gradient(weight, gradient, keep, 0.5, ALWAYS), torch.where(keep, gradient, 0.0))
    assert rule.next_mask(Layer(weight, gradient, POWER, keep, Pattern("unstructured"), 0.5), ALWAYS) is keep


def test_pruned_weights_decay_and_the_largest_are_the_mask() -> None:
    weight, gradient, keep = numbers()
    rule = MASK_RULES["sr-ste"]
    moved = rule.gradient(weight, gradient, keep, 0.5, ALWAYS)
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            decay = 0 if keep[row, column] else 0.5 * weight[row, column]
            assert math.isclose(moved[row, column], gradient[row, column] + decay, rel_tol=1e-6, abs_tol=1e-7)
    mask = rule.next_mask(Layer(weight, gradient, POWER, keep, Pattern("2:4"), 0.5), ALWAYS)
    for group, kept in zip(weight.reshape(-1, 4).tolist(), mask.reshape(-1, 4).tolist(), strict=True):
        largest = sorted(range(4), key=lambda place: -abs(group[place]))[:2]
        assert [place for place in range(4) if kept[place]] == sorted(largest)
    assert rule.after(weight, keep, mask, 0.5, ALWAYS) is weight


def test_the_least_important_survivors_make_room_for_the_largest_gradients() -> None:
    weight, gradient, keep = numbers(columns=200)
    power = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    rule = MASK_RULES["exchange"]
    mask = rule.next_mask(Layer(weight, gradient, power.clone, keep, Pattern("unstructured"), 0.5), ALWAYS)
    share = EXCHANGED * 0.5 * (1 + math.cos(math.pi * 10 / (LAST_EXCHANGE * 100)))
    moved = 0
    for row in range(len(weight)):
        survivors = [c for c in range(weight.shape[1]) if keep[row, c]]
        pruned = [c for c in range(weight.shape[1]) if not keep[row, c]]
        count = int(share * len(survivors))
        leave = sorted(survivors, key=lambda c: float(weight[row, c] ** 2 * power[row, c]))[:count]
        enter = sorted(pruned, key=lambda c: -abs(float(gradient[row, c])))[:count]
        assert set(mask[row].nonzero().flatten().tolist()) == set(survivors) - set(leave) | set(enter)
        moved += count
    assert moved > 0
    # What enters starts from zero, though Adam moved it on after it had left.
    assert torch.equal(rule.after(weight, keep, mask, 0.5, ALWAYS), torch.where(keep & mask, weight, 0.0))
    assert rule.after(weight, keep, keep, 0.5, ALWAYS) is weight


def test_groups_are_drawn_to_two_until_masks_settle() -> None:
    weight, gradient, keep = numbers()
    rule, settled = MASK_RULES["proximal"], Moment(step=80, steps=100, every=10)
    assert rule.seen(weight, keep) is weight
    assert torch.equal(rule.gradient(weight, gradient, keep, 0.5, ALWAYS), gradient)
    drawn = rule.after(weight, keep, keep, 0.1, ALWAYS)
    assert torch.equal(drawn.reshape(-1, 4), proximal(weight.reshape(-1, 4), 0.1))
    mask = rule.next_mask(
        Layer(weight, gradient, POWER, keep, Pattern("2:4"), 0.5), Moment(step=3, steps=100, every=10)
    )
    assert torch.equal(mask, Pattern("2:4").mask(weight.abs(), weight, 0.5))
    assert torch.equal(rule.gradient(weight, gradient, mask, 0.5, settled), torch.where(mask, gradient, 0.0))
    assert torch.equal(rule.after(weight, mask, mask, 0.1, settled), torch.where(mask, weight, 0.0))
    assert rule.next_mask(Layer(weight, gradient, POWER, mask, Pattern("2:4"), 0.5), settled) is mask


def test_a_rule_says_which_patterns_it_takes() -> None:
    patterns = ("unstructured", "unstructured-per-matrix", "2:4", "1:4")
    taken = {name: [p for p in patterns if rule.takes(Pattern(p))] for name, rule in MASK_RULES.items()}
    assert taken == {
        "fixed": list(patterns), "sr-ste": list(patterns), "exchange": list(patterns[:2]), "proximal": ["2:4"]
    }  # fmt: skip


def test_masks_settle_before_the_end() -> None:
    changes = [step for step in range(100) if Moment(step, 100, 10).changes]
    assert changes == [9, 19, 29, 39, 49, 59, 69]
    assert [step for step in range(100) if Moment(step, 100, 10).settled] == list(range(75, 100))
    assert Moment(74, 100, 10).share == pytest.approx(0, abs=1e-9)
