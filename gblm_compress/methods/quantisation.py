"""Quantisers: grids of the few values that a quantised weight W [rows, columns] may take.

A weight on a grid is scale · level. Scales are float16, one for a row or for neighbouring columns of a row. Levels are
int8, the same for a whole layer. int8 has -127 … 127. int4 has 16, chosen for the layer: pruning leaves a gap around
zero, where evenly spaced levels would be wasted. Without zeros they are even, -8 … 7, as other engines have them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import ModelError
from gblm_compress.methods.choices import Choice
from gblm_compress.methods.zeros import keep_only

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 127
LEVELS = {"int8": 2 * LARGEST + 1, "int4": 16}  # {kind of grid: number of levels}
GROUPS = (32, 64, 128)  # columns that may share a scale, besides a whole row
LEAST_SCALE, MOST_SCALE = 2.0**-21, 65504.0  # below the least, float16 may change a scale by a sixteenth
EVEN = tuple(range(-8, 8))  # levels of int4 if the inputs are unknown
# trial scales, relative to the one that holds a group's largest weight; they clip it
SHRINKS = tuple(1 - step / 40 for step in range(13))


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a layer may take."""

    scales: Tensor  # [rows, groups] in float16, not negative
    levels: Tensor  # [255] or [16] in int8, increasing
    group: int | None  # columns that share a scale; None for a row

    def scale_of(self, columns: int) -> Tensor:
        """The scale of every weight, [rows, columns] in float32, or [rows, 1] if a row has one."""
        return self.spread(self.scales.float(), columns)

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """Values of every scale, repeated for its weights: [rows, columns], or [rows, 1] if a row has one scale."""
        return values if self.group is None else values.repeat_interleave(self.group, 1)[:, :columns]

    def of_column(self, column: int) -> Grid:
        place = 0 if self.group is None else column // self.group
        return Grid(self.scales[:, place : place + 1], self.levels, None)

    def to(self, device: Any) -> Grid:
        return Grid(self.scales.to(device), self.levels.to(device), self.group)

    def stretched(self, factors: Tensor) -> Grid:
        """The grid with every scale multiplied by factors [rows, groups]."""
        return Grid(_half(self.scales.float() * factors), self.levels, self.group)


def make_grid(weight: Tensor, keep: Tensor, kind: str, group: int | None, importance: Tensor | None = None) -> Grid:
    """The grid with the least squared error for the survivors, by a search over scales and levels.

    `importance` [columns] weighs the error of a column by the power of its input. Without it, int4 has even steps, zero
    among them: small weights of strong inputs may count most. It has them too if `keep` is true everywhere.
    """
    import torch

    weight = keep_only(weight, keep)
    largest = _by_group(weight.abs(), group).amax(-1)
    is_even = importance is None or bool(keep.all())
    steps = EVEN if kind == "int4" and is_even else range(-LARGEST, LARGEST + 1)
    grid = Grid(_half(largest / steps[-1]), torch.tensor(steps, dtype=torch.int8, device=weight.device), group)
    if kind == "int8" or importance is None:
        return grid
    counts, scales, best = importance.to(weight) * keep, grid.scales, torch.full_like(largest, torch.inf)
    levels = grid.levels if is_even else _best_levels(weight, counts, grid)
    for shrink in SHRINKS:
        tried = Grid(_half(largest * (shrink / steps[-1])), levels, group)
        error = _by_group((restore(nearest(weight, tried), tried) - weight).square() * counts, group).sum(-1)
        scales = torch.where(error < best, tried.scales, scales)
        best = torch.minimum(error, best)
    grid = Grid(scales, levels, group)
    return grid if is_even else Grid(scales, _best_levels(weight, counts, grid), group)


def check_scales(
    layer: str, scales: Tensor, advice: str = "add the layer to --ignore, or prune without --quantise"
) -> None:
    """Raise ModelError if float16 does not hold the largest scale of a layer. Nearly empty rows have tiny ones."""
    largest = float(scales.max())
    if LEAST_SCALE <= largest <= MOST_SCALE or not largest:
        return
    least = float(scales[scales > 0].min())
    raise ModelError(
        f"{layer}: its weights need scales from {least:.1e} to {largest:.1e}, and the largest must be between "
        f"{LEAST_SCALE:.1e} and {MOST_SCALE:.1e}, as scales are float16; {advice}"
    )


def scales_of(weight: Tensor, group: int | None) -> Tensor:
    """The scales [rows, groups], in float32, that put the largest weight of each group at the largest level."""
    return _by_group(weight.abs(), group).amax(-1) / LARGEST


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest level of every weight, as its place in `grid.levels`: [rows, columns] in uint8.

    Levels meet half way. Twice that is an integer, so a table is enough; it takes a twentieth of a search's time.
    """
    import torch

    scale, levels = grid.scale_of(weight.shape[1]), grid.levels.short()
    first, last = 2 * int(levels[0]), 2 * int(levels[-1])
    table = torch.bucketize(torch.arange(first, last + 1, device=weight.device), levels[1:] + levels[:-1])
    twice = torch.where(scale > 0, 2 * weight / scale, 0.0)
    places = twice.ceil_().clamp_(first, last).sub_(first).int()
    return table.to(torch.uint8).index_select(0, places.flatten()).view(weight.shape)


def restore(codes: Tensor, grid: Grid) -> Tensor:
    """The weights [rows, columns] in float32 of places in `grid.levels`."""
    return grid.levels.float()[codes.int()] * grid.scale_of(codes.shape[1])


def rounded(weight: Tensor, keep: Tensor, grid: Grid) -> Tensor:
    """The survivors on their nearest grid points, +0.0 for all others: [rows, columns] in float32."""
    return keep_only(restore(nearest(weight, grid), grid), keep)


def straight_through(weight: Tensor, factors: Tensor, grid: Grid) -> Tensor:
    """The survivors on their nearest points of a stretched grid, [rows, columns] in float32, differentiable.

    Gradients pass to the weight as if it had not been rounded (arXiv 1308.3432). Factors [rows, groups] of the scales
    have the gradients of learned step sizes (LSQ, arXiv 1902.08153, eq. 3): the point less the weight within the grid,
    the point beyond it. Pruned weights are zero.
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
    """Scales in float16; a positive one stays positive."""
    import torch

    tiny = torch.finfo(torch.float16).smallest_normal / 1024  # the least above zero
    return torch.where(scales > 0, scales.clamp(min=tiny), 0.0).half()


def _best_levels(weight: Tensor, counts: Tensor, grid: Grid) -> Tensor:
    """The 16 levels with the least squared error for given scales (k-means in one dimension).

    Exact over a histogram of the integers -127 … 127, by dynamic programming over the borders between levels.
    """
    import torch

    bins = 2 * LARGEST + 1
    scale = grid.scale_of(weight.shape[1]).expand_as(weight)
    ratio = torch.where(scale > 0, weight / scale, 0.0)
    places = ratio.round().clamp(-LARGEST, LARGEST).long() + LARGEST
    mass = torch.zeros(bins, dtype=torch.float64)
    mass.index_add_(0, places.flatten().cpu(), (counts * scale.square()).double().flatten().cpu())
    mass += mass.sum().clamp(min=1.0) * 1e-12  # so every level has some mass
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
    make: Callable[..., Grid] | None = None  # as `make_grid`; None if weights are not rounded
    group: int | None = None  # columns that share a scale by default; None for a row


ROW = "row"  # a group that is all of a row
QUANTISERS: dict[str, Quantiser] = {
    "none": Quantiser(help="survivors stay floating-point numbers"),
    "int8": Quantiser(make=partial(make_grid, kind="int8"), help="255 evenly spaced values", reads=("group",)),
    "int4": Quantiser(
        make=partial(make_grid, kind="int4"), group=64, help="16 values, chosen for each layer", reads=("group",)
    ),
}


def columns_of_a_scale(quantise: str, group: str | int | None) -> int | None:
    """How many columns of a row share a scale; None for a row. `group` None: the quantiser's own."""
    if group is None:
        return QUANTISERS[quantise].group
    return None if group == ROW else int(group)


def grid_in_words(quantise: str, group: str | int | None) -> str | None:
    """The grid of the survivors; None if they are not rounded."""
    columns = columns_of_a_scale(quantise, group)
    shared = "row" if columns is None else f"{columns} columns"
    return None if QUANTISERS[quantise].make is None else f"{quantise}, a scale for every {shared}"
