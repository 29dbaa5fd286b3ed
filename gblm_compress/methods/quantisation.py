"""Quantisers: the grids of few values that a quantised weight may take. Pure functions on one layer.

A weight on a grid is scale · level. Scales are float16, one for each group of neighbouring columns of a row, or one for
a row. Levels are int8 and the same for a whole layer. int8 has all of them, -127 … 127. int4 has 16, chosen for the
layer: pruning leaves a gap around zero, on which evenly spaced levels would waste some of so few.

W is [rows, columns] in float32, `keep` a mask of its shape (True = survives).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gblm_compress.methods.choices import Choice
from gblm_compress.methods.zeros import keep_only

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 127
LEVELS = {"int8": 2 * LARGEST + 1, "int4": 16}
"""{kind of grid: how many levels it has}."""
GROUPS = (32, 64, 128)
"""Columns that may share a scale, beside all of a row."""
EVEN = tuple(range(-8, 8))
"""Levels of int4 where nothing is known of the inputs."""
SHRINKS = tuple(1 - step / 40 for step in range(13))
"""Shares of the scale that would hold a group's largest weight: smaller ones cut it off, for the sake of the others."""


@dataclass(frozen=True)
class Grid:
    """Where the weights of a layer may lie.

    Attributes:
        scales: [rows, groups] in float16, not negative.
        levels: [255] or [16] in int8, increasing.
        group: columns that share a scale; None where all of a row do.
    """

    scales: Tensor
    levels: Tensor
    group: int | None

    def scale_of(self, columns: int) -> Tensor:
        """The scale of every weight, [rows, columns] in float32, or [rows, 1] where a row has one."""
        return self.spread(self.scales.float(), columns)

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """A value of every scale as one of every weight, [rows, columns], or [rows, 1] where a row has one."""
        return values if self.group is None else values.repeat_interleave(self.group, 1)[:, :columns]

    def of_column(self, column: int) -> Grid:
        """The grid of one column, as a matrix of its own."""
        place = 0 if self.group is None else column // self.group
        return Grid(self.scales[:, place : place + 1], self.levels, None)

    def to(self, device: Any) -> Grid:
        """The grid on another device."""
        return Grid(self.scales.to(device), self.levels.to(device), self.group)

    def stretched(self, factors: Tensor) -> Grid:
        """The grid with every scale multiplied, by factors [rows, groups]."""
        return Grid(_half(self.scales.float() * factors), self.levels, self.group)


def make_grid(weight: Tensor, keep: Tensor, kind: str, group: int | None, importance: Tensor | None = None) -> Grid:
    """The grid with the least squared error for the survivors that a search over scales and levels finds.

    Where nothing is known of the inputs, int4 has even steps, zero among them: the weights that count most may be small
    ones of strong inputs, and no level may be far from them.

    Args:
        kind: of `LEVELS`.
        group: columns that share a scale; None for a whole row.
        importance: what the squared error of a column counts, [columns]: the power of its input; unset if unknown.
    """
    import torch

    weight = keep_only(weight, keep)
    counts = torch.zeros_like(weight) if importance is None else importance.to(weight) * keep
    largest = _by_group(weight.abs(), group).amax(-1)
    levels = torch.arange(-LARGEST, LARGEST + 1, dtype=torch.int8, device=weight.device)
    grid = Grid(_half(largest / LARGEST), levels, group)
    if kind == "int8":
        return grid
    if importance is None:
        return Grid(_half(largest / EVEN[-1]), torch.tensor(EVEN, dtype=torch.int8, device=weight.device), group)
    grid = Grid(grid.scales, _best_levels(weight, counts, grid), group)
    best = torch.full_like(largest, torch.inf)
    scales = grid.scales
    for shrink in SHRINKS:
        tried = Grid(_half(largest * (shrink / LARGEST)), grid.levels, group)
        error = _by_group((restore(nearest(weight, tried), tried) - weight).square() * counts, group).sum(-1)
        scales = torch.where(error < best, tried.scales, scales)
        best = torch.minimum(error, best)
    grid = Grid(scales, grid.levels, group)
    return Grid(scales, _best_levels(weight, counts, grid), group)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """For every weight the nearest level, as its place in `grid.levels`: [rows, columns] in uint8.

    Two levels part half way between them. Twice that is an integer, so that a table of integers says it all, which
    takes a twentieth of the time of a search.
    """
    import torch

    scale, levels = grid.scale_of(weight.shape[1]), grid.levels.short()
    first, last = 2 * int(levels[0]), 2 * int(levels[-1])
    table = torch.bucketize(torch.arange(first, last + 1, device=weight.device), levels[1:] + levels[:-1])
    twice = torch.where(scale > 0, 2 * weight / scale, 0.0)
    places = twice.ceil_().clamp_(first, last).sub_(first).int()
    return table.to(torch.uint8).index_select(0, places.flatten()).view(weight.shape)


def restore(codes: Tensor, grid: Grid) -> Tensor:
    """The weights of places in `grid.levels`: [rows, columns] in float32."""
    return grid.levels.float()[codes.int()] * grid.scale_of(codes.shape[1])


def rounded(weight: Tensor, keep: Tensor, grid: Grid) -> Tensor:
    """The survivors on their nearest grid points, +0.0 for all others: [rows, columns] in float32."""
    return keep_only(restore(nearest(weight, grid), grid), keep)


def straight_through(weight: Tensor, factors: Tensor, grid: Grid) -> Tensor:
    """The survivors of a weight on their nearest points of a stretched grid, in a form that can be fitted.

    Gradients pass to the weight as if it had not been rounded (arXiv 1308.3432); those of a factor are the ones of
    learned step sizes (LSQ, arXiv 1902.08153, eq. 3): the point less the weight within the grid, the point beyond it.

    Args:
        weight: zero where pruned.
        factors: of the scales, [rows, groups].

    Returns:
        [rows, columns] in float32.
    """
    import torch

    with torch.no_grad():
        stretched = grid.stretched(factors)
        point = rounded(weight, weight != 0, stretched)
        scale = stretched.scale_of(weight.shape[1])
        inside = (weight >= scale * grid.levels[0]) & (weight <= scale * grid.levels[-1])
        slope = torch.where(inside, point - weight, point) / grid.spread(factors, weight.shape[1])
    moved = (weight - weight.detach()) * inside
    return point + moved + slope * grid.spread(factors - factors.detach(), weight.shape[1])


def _by_group(values: Tensor, group: int | None) -> Tensor:
    """[rows, groups, columns of a group]; the last group is filled up with zeros."""
    from torch.nn.functional import pad

    size = values.shape[1] if group is None else group
    return pad(values, (0, -values.shape[1] % size)).reshape(len(values), -1, size)


def _half(scales: Tensor) -> Tensor:
    """Scales in float16; one that is not zero stays above zero."""
    import torch

    tiny = torch.finfo(torch.float16).smallest_normal / 1024  # the least above zero
    return torch.where(scales > 0, scales.clamp(min=tiny), 0.0).half()


def _best_levels(weight: Tensor, counts: Tensor, grid: Grid) -> Tensor:
    """The 16 levels of the least squared error for given scales: the exact optimum over a histogram of the integers
    -127 … 127, by dynamic programming over where the levels part (k-means in one dimension).
    """
    import torch

    bins = 2 * LARGEST + 1
    scale = grid.scale_of(weight.shape[1]).expand_as(weight)
    ratio = torch.where(scale > 0, weight / scale, 0.0)
    places = ratio.round().clamp(-LARGEST, LARGEST).long() + LARGEST
    mass = torch.zeros(bins, dtype=torch.float64)
    mass.index_add_(0, places.flatten().cpu(), (counts * scale.square()).double().flatten().cpu())
    mass += mass.sum().clamp(min=1.0) * 1e-12  # so that every level has something to stand for
    points = torch.arange(-LARGEST, LARGEST + 1, dtype=torch.float64)
    sums = torch.stack([mass, mass * points, mass * points.square()]).cumsum(1)
    before = torch.nn.functional.pad(sums, (1, 0))
    total, first, second = sums.unsqueeze(1) - before[:, :bins].unsqueeze(2)  # [start, end], both counted
    error = torch.where(
        torch.arange(bins) >= torch.arange(bins).unsqueeze(1), second - first.square() / total, torch.inf
    )
    least, chosen = error[0], []
    for _ in range(LEVELS["int4"] - 1):
        # the last part begins at `start`, the others end before it
        sums_of = torch.nn.functional.pad(least[:-1], (1, 0), value=torch.inf).unsqueeze(1) + error
        least, starts = sums_of.min(0)
        chosen.append(starts)
    levels, end = [], bins - 1
    for starts in [*reversed(chosen), torch.zeros(bins, dtype=torch.long)]:
        start = int(starts[end])
        levels.append(round(float(first[start, end] / total[start, end])))
        end = start - 1
    return torch.tensor(levels[::-1], dtype=torch.int8, device=weight.device)


@dataclass(frozen=True)
class Quantiser(Choice):
    """An entry of `QUANTISERS`.

    Attributes:
        make: the grid of a layer, of W, `keep`, `group` and `importance` as in `make_grid`; None where weights are not
            rounded.
        group: columns that share a scale unless the user says otherwise; None for a whole row.
    """

    make: Callable[..., Grid] | None = None
    group: int | None = None


ROW = "row"
"""A group that is all of a row."""

QUANTISERS: dict[str, Quantiser] = {
    "none": Quantiser(help="survivors stay floating-point numbers"),
    "int8": Quantiser(make=partial(make_grid, kind="int8"), help="255 evenly spaced values", reads=("group",)),
    "int4": Quantiser(
        make=partial(make_grid, kind="int4"), group=64, help="16 values, chosen for each layer", reads=("group",)
    ),
}


def columns_of_a_scale(quantise: str, group: str | int | None) -> int | None:
    """How many columns of a row share a scale; None for all of them.

    Args:
        quantise: of `QUANTISERS`.
        group: `ROW`, a number of columns, or None for the quantiser's own.
    """
    if group is None:
        return QUANTISERS[quantise].group
    return None if group == ROW else int(group)


def grid_in_words(quantise: str, group: str | int | None) -> str | None:
    """The grid of the survivors, for people; None where they are not rounded."""
    columns = columns_of_a_scale(quantise, group)
    shared = "row" if columns is None else f"{columns} columns"
    return None if QUANTISERS[quantise].make is None else f"{quantise}, a scale for every {shared}"
