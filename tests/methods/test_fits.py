"""Fits of layers against slow procedures that follow the papers weight by weight."""

import pytest
import torch
from torch import Tensor

from gblm_compress.methods.choices import Statistics
from gblm_compress.methods.fits import SWEEPS, least_squares, obs, settle, sparsegpt
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid, make_grid, rounded

KINDS = ("full", "rank-deficient", "dead columns", "one token", "all zero")


def layer(kind: str = "full", rows: int = 6, columns: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight and the Gram matrix of correlated inputs of some kind."""
    generator = torch.Generator().manual_seed(seed)
    tokens = {"full": 64, "rank-deficient": columns // 2, "one token": 1}.get(kind, 64)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    if kind == "dead columns":
        inputs[:, ::3] = 0
    if kind == "all zero":
        inputs.zero_()
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def wanda_mask(weight: Tensor, gram: Tensor, pattern: str, sparsity: float = 0.5) -> Tensor:
    return Pattern(pattern).mask(weight.abs() * gram.diagonal().sqrt(), weight, sparsity)


def with_damping(gram: Tensor) -> Tensor:
    """What the papers factorise: with a hundredth of the mean diagonal added; the identity where nothing comes in."""
    mean = float(gram.diagonal().double().mean())
    return gram.double() + (0.01 * mean if mean else 1.0) * torch.eye(len(gram), dtype=torch.float64)


def points_of(grid: Grid, row: int, column: int) -> list[float]:
    """Every value that a weight may take."""
    scale = float(grid.scales[row, 0 if grid.group is None else column // grid.group])
    return [scale * level for level in grid.levels.tolist()]


def slow_obs(weight: Tensor, gram: Tensor, choose, step: int, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """OBS one weight at a time in float64: the inverse of the remaining inputs' Hessian is recomputed for every column.

    What pruning or rounding w_j takes away is undone at once: w_right −= (w_j − point) / (H⁻¹)_jj · (H⁻¹)_j,right.
    """
    hessian, w = with_damping(gram), weight.double().clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(w.shape[1])]
    for j, inverse in enumerate(inverses):
        if j % step == 0:
            part = slice(j, j + step)
            mask[:, part] = choose(part, w[:, part], torch.stack([one[0, 0] for one in inverses[part]]))
        for i in range(w.shape[0]):
            value, point = float(w[i, j]), 0.0
            if mask[i, j]:
                point = value if grid is None else min(points_of(grid, i, j), key=lambda p: abs(p - value))
            w[i, j:] -= (value - point) / inverse[0, 0] * inverse[0]
            w[i, j] = point
    return w, mask


def error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    difference = (before - after).double()
    return float(((difference @ with_damping(gram)) * difference).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [None, ("int8", None), ("int4", None), ("int4", 32)])
def test_obs_with_any_mask_and_grid_is_column_by_column_obs(kind: str, grid) -> None:
    weight, gram = layer(kind, columns=160 if kind == "full" else 16)  # 160: more than one block of columns
    keep, statistics = wanda_mask(weight, gram, "2:4" if grid else "unstructured"), Statistics(gram=gram)
    result = obs(weight, keep, statistics)
    is_fine = kind == "full" and grid == ("int8", None)
    grid = make_grid(result, keep, *grid) if grid else None
    expected, _ = slow_obs(weight, gram, lambda part, current, diagonal: keep[:, part], 4, grid)
    if grid is None:
        torch.testing.assert_close(result.double(), expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(result != 0, keep & (expected.abs() > 0))
        return
    result = rounded(obs(weight, keep, statistics, grid), keep, grid)
    if is_fine:  # a near-tie tips among so many, and what is behind it follows
        step = grid.scale_of(weight.shape[1]).expand_as(weight)
        assert float(((result - expected).abs() > 1.01 * step).double().mean()) < 0.01
    else:
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_sparsegpt_is_column_by_column_obs_with_the_mask_chosen_on_the_way(kind: str, pattern: str) -> None:
    weight, gram = layer(kind)
    keep, group = Pattern(pattern).n_m

    def choose(part: slice, current: Tensor, diagonal: Tensor) -> Tensor:
        mask = torch.zeros_like(current, dtype=torch.bool)
        alive = gram.diagonal()[part] > 0
        for i, row in enumerate((current**2 / diagonal * alive).tolist()):
            for j in sorted(range(group), key=lambda j: (-row[j], -abs(current[i, j]), j))[:keep]:
                mask[i, j] = True
        return mask

    expected, expected_mask = slow_obs(weight, gram, choose, group)
    result, mask = sparsegpt(weight, gram, Pattern(pattern), 1 - keep / group)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(result.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sparsity", [0.6, 0.7, 0.9, 0.995])
def test_sparsegpt_keeps_what_other_methods_keep_however_many_parts_it_is_chosen_in(sparsity: float) -> None:
    weight, gram = layer(columns=640)
    for name in ("unstructured", "unstructured-per-matrix"):
        mask = sparsegpt(weight, gram, Pattern(name), sparsity)[1]
        assert int(mask.sum()) == int(wanda_mask(weight, gram, name, sparsity).sum())
        parts = mask.split(128, dim=1)
        assert max(int(part.sum()) for part in parts) - min(int(part.sum()) for part in parts) <= weight.shape[0]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "unstructured-per-matrix"])
def test_sparsegpt_gives_up_inputs_that_are_always_zero_first(pattern: str, scale: float) -> None:
    """However weak the others are: the same function has the same mask if its activations are rescaled."""
    weight, gram = layer("dead columns", rows=12)
    mask = sparsegpt(weight, gram * scale, Pattern(pattern), 0.5)[1]
    dead = gram.diagonal() == 0
    assert 0 < dead.sum() < 8 and not mask[:, dead].any()
    assert torch.equal(mask, sparsegpt(weight, gram, Pattern(pattern), 0.5)[1])


@pytest.mark.parametrize("power", [1.0, 1e3, 1e6])
def test_least_squares_is_near_the_optimum_where_one_input_dominates(power: float) -> None:
    """With the tolerance that is used: a dominating input is kept, and the others still make up for each other."""
    weight, gram = layer(rows=12, columns=64)
    scale = torch.ones(64)
    scale[0] = power**0.5
    gram = gram * scale * scale.unsqueeze(1)
    keep = wanda_mask(weight, gram, "2:4")
    whole, few = Statistics(gram=gram), Statistics(gram=gram, tokens=127)
    assert torch.equal(*(least_squares(weight, keep, of, 0.0, steps) for of, steps in ((whole, 10), (few, None))))
    optimum = error(weight, least_squares(weight, keep, whole, 1e-6, 1000), gram)
    none = error(weight, weight * keep, gram)
    assert none - error(weight, least_squares(weight, keep, whole), gram) > 0.99 * (none - optimum) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "unstructured-per-matrix"])
def test_least_squares_is_lstsq_on_the_support(kind: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gblm_compress.methods.fits.ROWS", 5)
    weight, gram = layer(kind, rows=12)
    weight[3:9, 1:] = 0.0  # the inputs of one column: such rows are done after one step, and put aside
    keep = wanda_mask(weight, gram, pattern)
    result = least_squares(weight, keep, Statistics(gram=gram), tolerance=1e-6)
    root = torch.linalg.cholesky(with_damping(gram)).T  # the damped error is ‖root (w − ŵ)‖²
    for row, support, got in zip(weight.double(), keep, result, strict=True):
        solution = torch.linalg.lstsq(root[:, support], (root @ row).unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(got[support].double(), solution, rtol=1e-3, atol=1e-3)
        assert (got[~support] == 0).all()


def slow_settle(weight: Tensor, start: Tensor, keep: Tensor, gram: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Every grid point is tried for every survivor, and the whole error of its row computed for each."""
    hessian, w = with_damping(gram), start.double().clone()
    for _ in range(sweeps):
        for i, j in keep.nonzero().tolist():
            points = torch.tensor(points_of(grid, i, j), dtype=torch.float64)
            tried = w[i].repeat(len(points), 1)
            tried[:, j] = points
            difference = weight[i].double() - tried
            w[i] = tried[((difference @ hessian) * difference).sum(1).argmin()]
    return w


@pytest.mark.parametrize(
    ("kind", "bits", "group"),
    [(kind, *grid) for kind in KINDS for grid in (("int8", None), ("int4", 32))] + [("many columns", "int4", 64)],
)
def test_survivors_settle_on_the_grid_as_when_every_point_is_tried(kind: str, bits: str, group: int | None) -> None:
    wide = kind == "many columns"  # more than one block
    weight, gram = layer(kind, rows=2 if wide else 6, columns=150 if wide else 16)
    keep, statistics = wanda_mask(weight, gram, "unstructured" if wide else "2:4"), Statistics(gram=gram)
    updated = least_squares(weight, keep, statistics)
    grid = make_grid(updated, keep, bits, group)
    start = rounded(updated, keep, grid)
    result = rounded(settle(weight, updated, keep, statistics, grid), keep, grid)
    expected = slow_settle(weight, start, keep, gram, grid, SWEEPS)
    assert error(weight, result, gram) == pytest.approx(error(weight, expected, gram), rel=0.02 if wide else 1e-3)
    assert error(weight, result, gram) <= (0.8 if wide else 1) * error(weight, start, gram)
    if not wide:  # else near-ties tip, and what is behind them follows
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
