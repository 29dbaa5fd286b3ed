"""The layouts `bitmask-int8` and `bitmask-int4`: one bit for each weight, the levels of the nonzeros, and scales.

The mask is that of the `bitmask` layout. int8 stores a level for each bit. int4 stores a place in a table of 16 levels,
two places to a byte, the first in its low half; those of each word of the mask begin with a byte, which kernels load.
Both are followed by `PADDING` zeros. In groups of 64 columns at 50 % they take 5.25 and about 3.3 bits a weight.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels.cpu_quantised import Quantised
from gblm_compress.kernels.masks import PADDING, WORD, bits, row_counts, row_starts, words
from gblm_compress.layouts import bitmask
from gblm_compress.layouts.bitmask import check_mask
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.layouts.quantised import QuantisedLinear, group_of, quantised_operator
from gblm_compress.methods.quantisation import LARGEST, LEVELS


def _padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, PADDING))


def _bytes_before(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each word of the mask, in order: how many bits it has, and at which byte its places begin."""
    counts = row_counts(mask.reshape(-1, 1))
    sizes = (counts + 1) // 2
    return counts, torch.cumsum(sizes, 0) - sizes


def _addresses(mask: Tensor) -> Tensor:
    """Which half of a byte each bit of the mask has its place in [nonzeros]."""
    counts, starts = _bytes_before(mask)
    first = 2 * starts - (torch.cumsum(counts, 0) - counts)
    return first.repeat_interleave(counts) + torch.arange(int(counts.sum()), device=mask.device)


def place_bytes(mask: Tensor) -> int:
    """How many bytes the places of all bits take."""
    counts, starts = _bytes_before(mask)
    return int(starts[-1] + (counts[-1] + 1) // 2)


def pack_places(mask: Tensor, places: Tensor) -> Tensor:
    """Places [nonzeros] in uint8, 0 … 15, two to a byte, and `PADDING` zeros."""
    halves = places.new_zeros(2 * place_bytes(mask))
    halves[_addresses(mask)] = places
    return _padded(halves[0::2] | (halves[1::2] << 4))


def unpack_places(mask: Tensor, values: Tensor) -> Tensor:
    """The places [nonzeros] of `pack_places`."""
    at = _addresses(mask)
    return (values[at // 2] >> (at % 2 * 4).to(torch.uint8)) & 15


class _BitmaskQuantised(QuantisedLinear):
    DERIVED = ("starts", "sums", "like")
    TYPE: ClassVar[torch.dtype]
    mask: Tensor
    values: Tensor
    starts: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        bias: bool,
        dtype: torch.dtype,
        device: str | None = None,
        group: int | None = None,
        *,
        stored: int,
    ) -> None:
        super().__init__(shape, bias, dtype, device, group)
        if type(stored) is not int or not 0 <= stored <= self.out_features * (self.in_features + 1):
            raise ModelError(f"stored {stored!r} is no number of bytes of a matrix of shape {list(shape)}")
        size = (self.out_features, -(-self.in_features // WORD))
        self.register_buffer("mask", torch.empty(size, dtype=torch.int64, device=device))
        self.register_buffer("values", torch.empty(stored + PADDING, dtype=self.TYPE, device=device))

    @classmethod
    def holding(cls, shape: Sequence[int], *packed: Tensor, **sizes: Any) -> Self:
        return super().holding(shape, *packed, **sizes, stored=max(0, packed[2].numel() - PADDING))

    def description(self) -> dict[str, Any]:
        return {**super().description(), "stored": self.values.numel() - PADDING}

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
        scales = torch.cat([layer.scales for layer in layers])
        mask, values = bitmask.stack([(layer.mask, layer.values) for layer in layers])
        whole = cls.holding(shape, scales, mask, values, *cls.joined_tables(layers))
        whole.like = layers[0].like
        return whole

    @classmethod
    def joined_tables(cls, layers: Sequence[Self]) -> tuple[Tensor, ...]:
        """What `PACKED` has beyond scales, mask and values, for layers one below the other."""
        return ()

    def check_bytes(self, bytes_needed: int) -> None:
        """Raises:
        ModelError: the values are not so many bytes and the padding.
        """
        if self.values.dim() != 1 or len(self.values) != bytes_needed + PADDING:
            raise ModelError(
                f"values: shape {list(self.values.shape)}; the bits of the mask take [{bytes_needed + PADDING}]: "
                f"{bytes_needed} bytes, and {PADDING} zeros of padding"
            )
        check_tensor("values", self.values, (self.TYPE,), self.values.shape)
        if self.values[bytes_needed:].count_nonzero():
            raise ModelError(f"values: the last {PADDING} must be zeros of padding; the file is damaged")

    def prepare(self) -> None:
        # A copy: loaded tensors are parts of a mapped file, and what is written into that later must not move a kernel.
        self._buffers["mask"] = self.mask.clone()
        super().prepare()

    def extra_repr(self) -> str:
        density = int(row_counts(self.mask).sum()) / (self.in_features * self.out_features)
        return f"{super().extra_repr()}, density={density:.3f}"


def _int8_levels(tensors: Sequence[Tensor], columns: int) -> Tensor:
    return bitmask.unpack(tensors[1], tensors[2], columns)


def _int8_weight(tensors: Sequence[Tensor], columns: int) -> Quantised:
    scales, mask, values, starts, sums, _ = tensors
    group = group_of(columns, scales.shape[1]) or 0
    return Quantised(values, scales, sums, columns, group, mask, starts)


class BitmaskInt8Linear(_BitmaskQuantised):
    """A `PackedLinear` in the bitmask-int8 layout.

    Attributes:
        mask: as in the bitmask layout.
        values: the levels of its bits, row by row, and `PADDING` zeros.
    """

    LAYOUT = "bitmask-int8"
    KIND = "int8"
    PACKED = ("scales", "mask", "values")
    TYPE = torch.int8
    OPERATOR = quantised_operator("bitmask_int8_linear", _int8_weight, _int8_levels)
    TOLERANCE = 1 / LARGEST
    LARGEST_ERROR = 0.03
    levels_of = staticmethod(_int8_levels)
    kernel_weight = staticmethod(_int8_weight)

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 1, 8

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return words(keep), _padded(levels[keep])

    def cut(self, rows: range, columns: range) -> Self:
        scales = self.cut_scales(rows, columns)
        part = bitmask.cut(self.mask, self.values, self.in_features, rows, columns)
        layer = self.holding((len(rows), len(columns)), scales, *part)
        layer.like = self.like
        return layer

    def check(self) -> None:
        check_mask(self.mask, (self.out_features, self.in_features))
        self.check_bytes(int(row_counts(self.mask).sum()))
        if bool((self.values < -LARGEST).any()):
            raise ModelError(f"values: a level is below -{LARGEST}; the file is damaged")
        super().check()

    def find_kernels(self) -> None:
        self.starts = row_starts(self.mask)
        super().find_kernels()


def _int4_levels(tensors: Sequence[Tensor], columns: int) -> Tensor:
    _, mask, values, table, *_ = tensors
    alive = bits(mask, columns)
    places = unpack_places(mask, values).int()
    rows = torch.arange(len(mask), device=mask.device).repeat_interleave(row_counts(mask)) if len(table) > 1 else 0
    levels = table.new_zeros(alive.shape)
    levels[alive] = table[rows, places]
    return levels


def _int4_weight(tensors: Sequence[Tensor], columns: int) -> Quantised:
    scales, mask, values, table, starts, sums, _ = tensors
    group = group_of(columns, scales.shape[1]) or 0
    return Quantised(values, scales, sums, columns, group, mask, starts, table)


class BitmaskInt4Linear(_BitmaskQuantised):
    """A `PackedLinear` in the bitmask-int4 layout.

    Attributes:
        mask: as in the bitmask layout.
        values: the places of its bits, as `pack_places` makes them.
        levels: the table of 16 levels: one for the layer, [1, 16], or, where layers were stacked, one for each row.
    """

    LAYOUT = "bitmask-int4"
    KIND = "int4"
    GROUP = 64
    PACKED = ("scales", "mask", "values", "levels")
    TYPE = torch.uint8
    OPERATOR = quantised_operator("bitmask_int4_linear", _int4_weight, _int4_levels)
    TOLERANCE = 0.5
    LARGEST_ERROR = 0.25
    levels_of = staticmethod(_int4_levels)
    kernel_weight = staticmethod(_int4_weight)
    levels: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        table = torch.empty(1, LEVELS[self.KIND], dtype=torch.int8, device=self.mask.device)
        self.register_buffer("levels", table)

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 1, 4

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        mask = words(keep)
        places = torch.searchsorted(table, levels[keep].contiguous()).to(torch.uint8)
        return mask, pack_places(mask, places), table.unsqueeze(0).contiguous()

    @classmethod
    def joined_tables(cls, layers: Sequence[Self]) -> tuple[Tensor, ...]:
        if len({tuple(layer.levels.flatten().tolist()) for layer in layers}) == 1:
            return (layers[0].levels.clone(),)
        return (torch.cat([layer.levels.expand(layer.out_features, -1) for layer in layers]),)

    def cut(self, rows: range, columns: range) -> Self:
        scales = self.cut_scales(rows, columns)
        places = _padded(unpack_places(self.mask, self.values))
        mask, kept = bitmask.cut(self.mask, places, self.in_features, rows, columns)
        table = self.levels if len(self.levels) == 1 else self.levels[rows.start : rows.stop]
        values = pack_places(mask, kept[: len(kept) - PADDING])
        layer = self.holding((len(rows), len(columns)), scales, mask, values, table.clone())
        layer.like = self.like
        return layer

    def table(self) -> Tensor:
        return self.levels[0]

    def check(self) -> None:
        check_mask(self.mask, (self.out_features, self.in_features))
        self.check_bytes(place_bytes(self.mask))
        tables = self.out_features if self.levels.dim() == 2 and len(self.levels) > 1 else 1
        check_tensor("levels", self.levels, (torch.int8,), (tables, LEVELS[self.KIND]))
        if bool((self.levels[:, 1:] <= self.levels[:, :-1]).any()) or bool((self.levels < -LARGEST).any()):
            raise ModelError(f"levels: they do not increase from -{LARGEST} or more; the file is damaged")
        super().check()

    def find_kernels(self) -> None:
        _, starts = _bytes_before(self.mask)
        self.starts = starts.reshape(self.mask.shape)[:, 0].contiguous()
        super().find_kernels()
