"""Kinds of values: how a layout stores the weights that its mask chooses.

`held` is {buffer: tensor} of a packed weight. With 8 bits, each bit of the mask has a level. With 4 bits, it has a
place in a table of 16 levels; a byte holds two, the low half first. Each word of the mask begins a new byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import PADDING, WORD, bits, starts_of, word_counts, words
from gblm_compress.layouts.masks import Mask, Shape
from gblm_compress.layouts.packed import AT_ONCE, DTYPES, MOVES_MUCH, by_rows, check_tensor, same_bits
from gblm_compress.methods.quantisation import GROUPS, LARGEST, LEVELS, Grid, make_grid, nearest, rounded

Held = Mapping[str, Tensor]
_INFINITE = 0x7C00  # bits of float16's infinity; NaNs have more, and negative numbers are negative as int16
_MOST_COLUMNS = 1024 * WORD  # of a row of levels; more would overflow the kernels' integers


class Floats:
    """Weights as they are. Other kinds are subclasses.

    Attributes:
        names: the buffers on disk. All but the values have a row for each row of the weight.
        sizes: the keys of `config.json`, besides the shape, that make an empty layer.
    """

    width: int | None = None  # bits of a stored weight; None: as many as the dtype
    tolerance = 0.0  # largest difference of a restored weight, relative to the largest weight; 0: bit for bit
    largest_error = float("inf")  # a layer with a larger `error` gets the layout `Layout.exact`
    dtypes: tuple[torch.dtype, ...] = DTYPES  # of the values
    counted = "nonzeros"  # the key of `sizes` with the number of values, if the shape does not give it

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.counts = mask.stored == "mask"
        self.names: tuple[str, ...] = (*((mask.name,) if mask.name else ()), "values")
        self.sizes: tuple[str, ...] = (self.counted,) if self.counts else ()

    def empty(self, shape: Shape, dtype: torch.dtype, device: str | None, sizes: dict[str, Any]) -> dict[str, Tensor]:
        """Empty buffers, in order of `names`; ModelError for impossible sizes."""
        count, most = sizes.get(self.counted, 0), shape[0] * (shape[1] + bool(self.width))
        if type(count) is not int or not 0 <= count <= most:
            raise ModelError(f"{self.counted} {count!r} is impossible for a matrix of shape {list(shape)}")
        values = torch.empty(self.mask.values_shape(shape, count), dtype=dtype, device=device)
        if self.mask.name is None:
            return {"values": values}
        mask = torch.empty(self.mask.buffer_shape(shape), dtype=self.mask.dtype, device=device)
        return {self.mask.name: mask, "values": values}

    def sizes_of(self, held: Held, shape: Shape) -> dict[str, Any]:
        return {self.counted: max(0, held["values"].numel() - PADDING)} if self.counts else {}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack a weight [rows, columns] in one of `DTYPES`; UsageError if the layout cannot hold it."""
        stored = self.mask.choose(weight)
        return self._hold(self.mask.from_words(words(stored), weight.shape[1]), weight[stored], weight.shape)

    def unpack(self, held: Held, columns: int, dtype: torch.dtype) -> Tensor:
        """The dense weight [rows, columns], within `tolerance`."""
        return self.spread(held, columns)

    def spread(self, held: Held, columns: int) -> Tensor:
        """The stored values [rows, columns]; zero if none is stored."""
        return self.mask.spread(self.places(held), self.mask.flat(held["values"]), columns)

    def stack(self, parts: Sequence[Held], heights: Sequence[int], columns: int) -> dict[str, Tensor]:
        """A copy of several packed weights, one below the other; UsageError if they have no common form."""
        values = torch.cat([self.mask.flat(held["values"]) for held in parts])
        others = {name: torch.cat([held[name] for held in parts]) for name in self.names if name != "values"}
        return {**others, "values": self.mask.hold(values, (sum(heights), columns))}

    def cut(self, held: Held, shape: Shape, rows: range, columns: range) -> dict[str, Tensor]:
        """Ranges of rows and columns, packed anew; UsageError if the layout cannot be cut there."""
        return self.pack(self._part(held, shape, rows, columns))

    def check(self, held: Held, shape: Shape, group: int | None) -> None:
        """ModelError, beginning with a buffer's name, if kernels must not read the buffers.

        Stored values may be zero: a cast to a narrower dtype makes some weights zero.
        """
        count = 0
        if self.mask.name:
            self.mask.check(held[self.mask.name], shape)
            count = int(self.sizes_of_words(self.mask.to_words(held[self.mask.name])).sum())
        self.mask.check_values(held["values"], self.dtypes, shape, count)

    def restores(self, held: Held, restored: Tensor, weight: Tensor) -> bool:
        """Whether the unpacked weight equals that matrix, within `tolerance`."""
        if not self.tolerance:
            return same_bits(restored, weight)
        return bool((restored - weight).abs().max() <= self.tolerance * weight.abs().max())

    def sizes_of_words(self, mask: Tensor) -> Tensor:
        """How many values each word of a mask [rows, words] has."""
        return word_counts(mask)

    def places(self, held: Held) -> Tensor:
        """The mask's buffer, or the values if there is none."""
        return held[self.mask.name or "values"]

    def _hold(self, buffer: Tensor, values: Tensor, shape: Shape) -> dict[str, Tensor]:
        return {**({self.mask.name: buffer} if self.mask.name else {}), "values": self.mask.hold(values, shape)}

    def _part(self, held: Held, shape: Shape, rows: range, columns: range) -> Tensor:
        weight = self.unpack(held, shape[1], torch.float32)
        return weight[rows.start : rows.stop, columns.start : columns.stop].contiguous()

    def _starts(self, held: Held) -> Tensor:
        return held["starts"] if "starts" in held else starts_of(self.sizes_of_words(held["mask"]).sum(1))

    def for_cpu(self, held: Held, shape: Shape, dtype: torch.dtype) -> cpu.Weight | None:
        """The weight for the CPU's kernels, None without any; `held` may have `starts` and `sums`."""
        if self.mask.stored != "mask":
            return None
        return cpu.Bitmask(held["mask"], held["values"], self._starts(held), shape[1])

    def for_gpu(self, held: Held, layout: str, shape: Shape, dtype: torch.dtype) -> Any:
        """The weight as `gpu.Packed`; with a mask, `held` has its `starts`."""
        from gblm_compress.kernels.gpu import Packed

        values, scales, size = held["values"], held.get("scales"), (shape[0], shape[1])
        starts = held["starts"] if self.mask.stored == "mask" else values
        group = 0 if scales is None else group_of(shape[1], scales.shape[1]) or 0
        read = values, self.places(held), starts, size, dtype, scales, held.get("levels"), group
        return Packed(layout, self.mask.stored, self.width or 16, *read)


class Levels(Floats):
    """Weights as scale · level, with levels of 8 bits.

    Scales [rows, groups] are the bits of float16 in int16, which a cast of the model does not change.
    """

    kind = "int8"
    group: int | None = None  # columns that share a scale by default; None: all of a row
    width = 8
    dtypes = (torch.int8,)
    tolerance = 1 / LARGEST
    largest_error = MOVES_MUCH[8]
    counted = "stored"

    def __init__(self, mask: Mask) -> None:
        super().__init__(mask)
        self.names = ("scales", *self.names)
        self.sizes = ("group", *self.sizes)

    def empty(self, shape: Shape, dtype: torch.dtype, device: str | None, sizes: dict[str, Any]) -> dict[str, Tensor]:
        group = sizes.get("group")
        if group is not None and (type(group) is not int or group not in GROUPS):
            raise ModelError(f"group {group!r} is not one of {', '.join(map(str, GROUPS))}, or null for whole rows")
        scales = torch.empty((shape[0], groups_of(shape[1], group)), dtype=torch.int16, device=device)
        return {"scales": scales, **super().empty(shape, self.dtypes[0], device, sizes)}

    def sizes_of(self, held: Held, shape: Shape) -> dict[str, Any]:
        groups = held["scales"].shape[1] if held["scales"].dim() == 2 else 0
        return {"group": group_of(shape[1], groups), **super().sizes_of(held, shape)}

    def holds(self, grid: Grid | None) -> bool:
        """Whether weights on that grid are stored exactly: it has no more levels than the layout."""
        return grid is not None and len(grid.levels) <= LEVELS[self.kind]

    def pack(self, weight: Tensor, *, group: int | None = None, grid: Grid | None = None) -> dict[str, Tensor]:
        """Round nonzero weights to the nearest points of `grid`, or of a new one with scales for `group` columns."""
        if grid is None and weight.numel() > AT_ONCE and len(weight) > 1:
            parts = [self.pack(rows, group=group) for rows in weight.chunk(1 + weight.numel() // AT_ONCE)]
            return self.stack(parts, [len(part["scales"]) for part in parts], weight.shape[1])
        keep = weight != 0
        stored = self.mask.choose(keep)
        grid = grid or make_grid(weight.float(), keep, self.kind, group or self.group)
        levels, table = grid.levels[nearest(weight.float(), grid).int()], grid.levels
        buffer = self.mask.from_words(words(stored), weight.shape[1])
        values = self._stored(levels[stored], table, buffer)
        return {"scales": grid.scales.contiguous().view(torch.int16), **self._hold(buffer, values, weight.shape)}

    def _stored(self, levels: Tensor, table: Tensor, buffer: Tensor) -> Tensor:
        return levels

    def grid(self, held: Held, columns: int) -> Grid:
        scales = held["scales"].view(torch.float16)
        return Grid(scales, self.table(held), group_of(columns, scales.shape[1]))

    def unpack(self, held: Held, columns: int, dtype: torch.dtype) -> Tensor:
        return (self.spread(held, columns) * self.grid(held, columns).scale_of(columns)).to(dtype)

    def stack(self, parts: Sequence[Held], heights: Sequence[int], columns: int) -> dict[str, Tensor]:
        if len({held["scales"].shape[1] for held in parts}) > 1:
            raise UsageError(
                "layers that an engine merges have scales for different numbers of columns; export with the --group "
                "that all of them take"
            )
        return super().stack(parts, heights, columns)

    def cut(self, held: Held, shape: Shape, rows: range, columns: range) -> dict[str, Tensor]:
        whole = self.grid(held, shape[1])
        scales, group = whole.scales[rows.start : rows.stop], whole.group
        if group is not None:
            if columns.start % group or (columns.stop % group and columns.stop != shape[1]):
                raise UsageError(
                    f"columns {columns.start} to {columns.stop - 1}: {group} columns share a scale, so the layout "
                    "can be cut only at their multiples"
                )
            scales = scales[:, columns.start // group : -(-columns.stop // group)]
        grid = Grid(scales.clone(), whole.levels.clone(), group)  # not parts of a mapped file
        return self.pack(self._part(held, shape, rows, columns), grid=grid)

    def check(self, held: Held, shape: Shape, group: int | None) -> None:
        super().check(held, shape, group)
        self._check_levels(held, shape)
        scales = held["scales"]
        check_tensor("scales", scales, (torch.int16,), (shape[0], groups_of(shape[1], group)))
        if not bool(((scales >= 0) & (scales < _INFINITE)).all()):
            raise ModelError(
                "scales: some are negative or not finite in float16; the weights are too large, or the file is damaged"
            )
        if not scales.any() and self.spread(held, shape[1]).any():  # cast to int16, all are zero
            raise ModelError("scales: all are zero; the file is damaged, or they are not stored as int16")

    def _check_levels(self, held: Held, shape: Shape) -> None:
        if bool((held["values"] < -LARGEST).any()):
            raise ModelError(f"values: a level is below -{LARGEST}; the file is damaged")

    def table(self, held: Held) -> Tensor:
        return torch.arange(-LARGEST, LARGEST + 1, dtype=torch.int8, device=held["scales"].device)

    def restores(self, held: Held, restored: Tensor, weight: Tensor) -> bool:
        """Whether each weight is the grid point nearest to the matrix's weight, and zeros are 0."""
        grid = self.grid(held, weight.shape[1])
        point = by_rows(lambda w, s: rounded(w.float(), w != 0, replace(grid, scales=s)), weight, grid.scales)
        return same_bits(restored, point.to(weight.dtype))

    def for_cpu(self, held: Held, shape: Shape, dtype: torch.dtype) -> cpu.Weight | None:
        columns, scales, values = shape[1], held["scales"], held["values"]
        if columns > _MOST_COLUMNS:
            return None
        stored: dict[str, Tensor] = {name: held[name] for name in ("mask", "levels") if name in self.names}
        if "mask" in stored:
            stored["starts"] = self._starts(held)
        if not self.mask.name and columns % WORD:
            values = pad(values, (0, -columns % WORD))  # whole words
        group = group_of(columns, scales.shape[1]) or 0
        make = partial(cpu.Quantised, values, scales, columns=columns, dtype=dtype, group=group, **stored)
        return make(sums=held["sums"] if "sums" in held else make(sums=torch.empty(0)).row_sums())


class Places(Levels):
    """Weights as scale · level, stored as places in a table of 16 levels. Needs a `Bitmask`.

    The buffer `levels` is [1, 16], or [rows, 16] after layers were stacked.
    """

    kind = "int4"
    group = 64
    width = 4
    dtypes = (torch.uint8,)
    tolerance = 0.5
    largest_error = MOVES_MUCH[4]

    def __init__(self, mask: Mask) -> None:
        super().__init__(mask)
        self.names = (*self.names, "levels")

    def empty(self, shape: Shape, dtype: torch.dtype, device: str | None, sizes: dict[str, Any]) -> dict[str, Tensor]:
        table = torch.empty(1, LEVELS[self.kind], dtype=torch.int8, device=device)
        return {**super().empty(shape, dtype, device, sizes), "levels": table}

    def pack(self, weight: Tensor, *, group: int | None = None, grid: Grid | None = None) -> dict[str, Tensor]:
        grid = grid or make_grid(weight.float(), weight != 0, self.kind, group or self.group)
        return {**super().pack(weight, grid=grid), "levels": grid.levels.unsqueeze(0).contiguous()}

    def _stored(self, levels: Tensor, table: Tensor, buffer: Tensor) -> Tensor:
        places = torch.searchsorted(table, levels.contiguous()).to(torch.uint8)
        return pack_places(buffer, places)

    def sizes_of_words(self, mask: Tensor) -> Tensor:
        return _bytes(word_counts(mask))

    def spread(self, held: Held, columns: int) -> Tensor:
        mask, table = held["mask"], held["levels"]
        places = unpack_places(mask, held["values"]).int()
        if len(table) > 1:
            first = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=mask.device)
            places += first.repeat_interleave(word_counts(mask).sum(1))
        alive, levels = bits(mask, columns), table.flatten().index_select(0, places)
        return table.new_zeros(alive.shape).masked_scatter_(alive, levels)

    def stack(self, parts: Sequence[Held], heights: Sequence[int], columns: int) -> dict[str, Tensor]:
        whole, tables = super().stack(parts, heights, columns), [held["levels"] for held in parts]
        if len({tuple(table.flatten().tolist()) for table in tables}) == 1:
            return {**whole, "levels": tables[0].clone()}
        rows = [table.expand(count, -1) for table, count in zip(tables, heights, strict=True)]
        return {**whole, "levels": torch.cat(rows)}

    def _check_levels(self, held: Held, shape: Shape) -> None:
        levels = held["levels"]
        tables = shape[0] if levels.dim() == 2 and len(levels) > 1 else 1
        check_tensor("levels", levels, (torch.int8,), (tables, LEVELS[self.kind]))
        if bool((levels[:, 1:] <= levels[:, :-1]).any()) or bool((levels < -LARGEST).any()):
            raise ModelError(f"levels: they do not increase from -{LARGEST} or more; the file is damaged")

    def table(self, held: Held) -> Tensor:
        return held["levels"][0]


def groups_of(columns: int, group: int | None) -> int:
    return 1 if group is None else -(-columns // group)


def group_of(columns: int, groups: int) -> int | None:
    """The columns that share a scale, None for a whole row; ModelError if rows cannot have so many groups."""
    found = [group for group in (None, *GROUPS) if groups_of(columns, group) == groups]
    if not found:
        raise ModelError(f"scales: {groups} for each row; rows of {columns} columns cannot have so many groups")
    return found[0]


def _bytes(places: Tensor) -> Tensor:
    return (places + 1) // 2


def _used(mask: Tensor) -> Tensor:
    """Which half bytes hold a place [half bytes]: all but the last of a word with an odd number of bits."""
    counts = word_counts(mask.flatten())
    ends = 2 * _bytes(counts).cumsum(0)
    used = torch.ones(int(ends[-1]) if len(ends) else 0, dtype=torch.bool, device=mask.device)
    used[ends[counts % 2 == 1] - 1] = False
    return used


def pack_places(mask: Tensor, places: Tensor) -> Tensor:
    """Places [nonzeros] in uint8, 0 … 15, two to a byte, for a mask [rows, words]."""
    used = _used(mask)
    halves = places.new_zeros(len(used)).masked_scatter_(used, places)
    return halves[0::2] | (halves[1::2] << 4)


def unpack_places(mask: Tensor, values: Tensor) -> Tensor:
    """The inverse of `pack_places`; `values` may be padded."""
    used = _used(mask)
    values = values[: len(used) // 2]
    return torch.stack([values & 15, values >> 4], -1).flatten()[used]
