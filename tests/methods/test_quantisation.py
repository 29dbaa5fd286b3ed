"""Grids against loops that try every value."""

from itertools import combinations

import pytest
import torch

from gblm_compress.methods import quantisation
from gblm_compress.methods.quantisation import Grid, make_grid, nearest, rounded, straight_through

INT8 = torch.arange(-127, 128, dtype=torch.int8)


def _matrix(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight, weight.abs() > weight.abs().median()


@pytest.mark.parametrize("levels", [INT8, torch.tensor([-128, -81, -80, -3, 0, 4, 127], dtype=torch.int8)])
def test_levels_part_half_way_and_there_the_smaller_is_taken(levels) -> None:
    points = torch.arange(-300.0, 300.0, 0.25)
    weight = torch.stack([points * 2**-7, points.nextafter(points + 1) * 2**-7, torch.full_like(points, 1e38)])
    grid = Grid(torch.tensor([[2.0**-7], [2.0**-7], [0.0]]).half(), levels, None)
    expected = [
        [min(range(len(levels)), key=lambda place: abs(float(levels[place]) - value)) for value in row]
        for row in (weight[:2].double() * 2**7).tolist()
    ]
    zero = int((levels <= 0).sum()) - 1
    assert nearest(weight, grid).tolist() == [*expected, [zero] * len(points)]


@pytest.mark.parametrize("group", [None, 32])
def test_int8_errs_by_half_a_step_at_most(group: int | None) -> None:
    weight, keep = _matrix(8, 100)
    grid = make_grid(weight, keep, "int8", group)
    assert grid.scales.shape == (8, 1 if group is None else 4) and torch.equal(grid.levels, INT8)
    values = rounded(weight, keep, grid)
    step = grid.scale_of(100).expand(8, 100)
    assert bool(((values - weight).abs()[keep] <= 0.51 * step[keep]).all())
    assert values[~keep].count_nonzero() == 0 and not torch.signbit(values[~keep]).any()
    again = make_grid(values, values != 0, "int8", group)
    assert torch.allclose(rounded(values, values != 0, again), values, atol=1e-3)


def test_the_levels_of_int4_are_the_best_for_their_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 levels of 15 bins, all ways to part the bins can be tried."""
    monkeypatch.setattr(quantisation, "LARGEST", 7)
    monkeypatch.setitem(quantisation.LEVELS, "int4", 3)
    integers = torch.tensor([[-7, -7, -6, -1, -1, 3, 3, 3, 4, 7, 7, 7.0]])
    grid = Grid(torch.ones(1, 1).half(), torch.arange(-7, 8, dtype=torch.int8), None)
    levels = quantisation._best_levels(integers, torch.ones_like(integers), grid).tolist()

    def error(chosen: tuple[int, ...]) -> float:
        return sum(min((float(value) - level) ** 2 for level in chosen) for value in integers[0])

    assert error(tuple(levels)) == min(error(chosen) for chosen in combinations(range(-7, 8), 3))


def test_int4_wastes_no_levels_on_the_gap_that_pruning_leaves() -> None:
    weight, keep = _matrix(64, 256)
    grid = make_grid(weight, keep, "int4", 64, torch.ones(256))
    assert grid.levels.shape == (16,) and bool((grid.levels[1:] > grid.levels[:-1]).all())
    error = (rounded(weight, keep, grid) - weight)[keep].square().mean()
    gap = weight[keep].abs().min() / grid.scales.float().mean()
    assert float(grid.levels.abs().min()) > 0.8 * float(gap)
    even = make_grid(weight, keep, "int4", 64)
    assert error < 0.7 * (rounded(weight, keep, even) - weight)[keep].square().mean()


def test_important_columns_are_closer_to_the_grid() -> None:
    weight, keep = _matrix(16, 64)
    importance = torch.ones(64)
    importance[:8] = 1000.0
    plain, weighted = (make_grid(weight, keep, "int4", None, counts) for counts in (torch.ones(64), importance))
    errors = [(rounded(weight, keep, grid) - weight).square()[:, :8].sum() for grid in (plain, weighted)]
    assert errors[1] < errors[0]


def test_int4_has_even_steps_where_nothing_is_known_of_the_inputs() -> None:
    weight, keep = _matrix(8, 100)
    grid = make_grid(weight, keep, "int4", 64)
    assert grid.levels.tolist() == list(range(-8, 8))
    largest = torch.stack([part.abs().amax(1) for part in (weight * keep).split(64, 1)], 1)
    torch.testing.assert_close(grid.scales.float(), largest / 7, rtol=1e-3, atol=0)


@pytest.mark.parametrize("group", [None, 32])
def test_without_zeros_int4_has_even_steps_and_the_best_of_the_tried_scales(group: int | None) -> None:
    weight, importance = _matrix(4, 96)[0], torch.linspace(0.1, 3, 96)
    grid = make_grid(weight, torch.ones(4, 96, dtype=torch.bool), "int4", group, importance)
    assert grid.levels.tolist() == list(range(-8, 8))

    def error(part: list[tuple[float, float]], scale: float) -> float:
        return sum(count * min((value - scale * level) ** 2 for level in range(-8, 8)) for value, count in part)

    for row, scales in zip(weight.tolist(), grid.scales.tolist(), strict=True):
        pairs = list(zip(row, importance.tolist(), strict=True))
        for at, scale in zip(range(0, 96, group or 96), scales, strict=True):
            part = pairs[at : at + (group or 96)]
            largest = max(abs(value) for value, _ in part) / 7
            tried = [error(part, float(torch.tensor(largest * (1 - step / 40)).half())) for step in range(13)]
            assert error(part, scale) == pytest.approx(min(tried), rel=1e-5)


def test_rows_without_survivors_stay_zero_and_tiny_scales_above() -> None:
    weight, keep = torch.ones(2, 64), torch.zeros(2, 64, dtype=torch.bool)
    for kind in ("int8", "int4"):
        grid = make_grid(weight, keep, kind, 32)
        assert rounded(weight, keep, grid).count_nonzero() == 0 and bool(grid.scales.isfinite().all())
    tiny = torch.full((1, 32), 1e-7)
    assert bool((make_grid(tiny, tiny != 0, "int8", None).scales > 0).all())


@pytest.mark.parametrize("group", [None, 4])
def test_gradients_pass_through_rounding_and_scales_get_their_own(group: int | None) -> None:
    """Against the formulas of LSQ, weight by weight: level less w/s within the grid, the outermost level beyond it."""
    weight, keep = _matrix(3, 10)
    weight *= keep
    levels = torch.tensor([-60, -30, -10, 12, 33, 50], dtype=torch.int8)
    scales = torch.full((3, 1 if group is None else 3), 0.02).half()
    factors = torch.rand(scales.shape, generator=torch.Generator().manual_seed(2)) / 2 + 0.75
    grid = Grid(scales, levels, group)
    weight.requires_grad_()
    factors.requires_grad_()
    seen = straight_through(weight, factors, grid)
    assert torch.equal(seen.detach(), rounded(weight.detach(), keep, grid.stretched(factors.detach())))
    outer = torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    (seen * outer).sum().backward()
    with torch.no_grad():
        scale = grid.stretched(factors).scale_of(10)
        ratio, level = weight / scale, seen / scale
        outside = (ratio < -60) | (ratio > 50)
        slope = outer * 0.02 * torch.where(outside, level, level - ratio)
    assert 0 < outside.sum() < 15
    torch.testing.assert_close(weight.grad, outer * ~outside)
    groups = [slope] if group is None else slope.split(group, 1)
    expected = torch.stack([one.sum(1) for one in groups], 1)
    torch.testing.assert_close(factors.grad, expected, rtol=2e-3, atol=2e-3)
