"""What quantised layouts of pruned weights share: levels of 8 or 4 bits in the order of a mask, however that is stored.

int8 stores a level for each bit of the mask. int4 stores a place in a table of 16 levels, two places to a byte, the
first in its low half; those of each word of the mask begin with a byte, which kernels load. Both are followed by
`PADDING` zeros.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels.masks import PADDING, bits, row_counts, words
from gblm_compress.layouts import bitmask
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.layouts.packed_linear import MOVES_MUCH
from gblm_compress.layouts.quantised import QuantisedLinear
from gblm_compress.methods.quantisation import LARGEST, LEVELS


def _padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, PADDING))


def bytes_before(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each word of the mask, in order: how many bits it has, and at which byte its places begin."""
    counts = row_counts(mask.reshape(-1, 1))
    sizes = (counts + 1) // 2
    return counts, torch.cumsum(sizes, 0) - sizes


def _addresses(mask: Tensor) -> Tensor:
    """Which half of a byte each bit of the mask has its place in [nonzeros]."""
    counts, starts = bytes_before(mask)
    first = 2 * starts - (torch.cumsum(counts, 0) - counts)
    return first.repeat_interleave(counts) + torch.arange(int(counts.sum()), device=mask.device)


def place_bytes(mask: Tensor) -> int:
    """How many bytes the places of all bits take."""
    counts, starts = bytes_before(mask)
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


class MaskedLinear(QuantisedLinear):
    """A `QuantisedLinear` of a mask and the levels of its bits. A layout says how the mask is stored.

    Attributes:
        PACKED: the scales, what stands for the mask, the values; what else there is.
        TYPE: of the values.
        values: what `bytes_needed` says, row by row, and `PADDING` zeros.
    """

    TYPE: ClassVar[torch.dtype]
    values: Tensor

    @staticmethod
    def mask_of(stored: Tensor) -> Tensor:
        """The mask [rows, words] of what stands for it."""
        raise NotImplementedError

    @staticmethod
    def stored_of(mask: Tensor) -> Tensor:
        """What stands for a mask [rows, words]."""
        raise NotImplementedError

    @staticmethod
    def bytes_needed(mask: Tensor) -> int:
        """How many bytes the values of that mask take."""
        raise NotImplementedError

    @classmethod
    def joined_tables(cls, layers: Sequence[Self]) -> tuple[Tensor, ...]:
        """What `PACKED` has beyond the values, for layers one below the other."""
        return ()

    @property
    def stored(self) -> Tensor:
        """What stands for the mask."""
        return self.get_buffer(self.PACKED[1])

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
        scales = cls.joined_scales(layers)
        stored, values = bitmask.stack([(layer.stored, layer.values) for layer in layers])
        whole = cls.holding(shape, scales, stored, values, *cls.joined_tables(layers))
        whole.like = layers[0].like
        return whole

    def check_stored(self) -> None:
        """Raises:
        ModelError: what stands for the mask stands for none.
        """
        raise NotImplementedError

    def check(self) -> None:
        self.check_stored()
        needed = self.bytes_needed(self.mask_of(self.stored))
        if self.values.dim() != 1 or len(self.values) != needed + PADDING:
            raise ModelError(
                f"values: shape {list(self.values.shape)}; the bits of the mask take [{needed + PADDING}]: "
                f"{needed} bytes, and {PADDING} zeros of padding"
            )
        check_tensor("values", self.values, (self.TYPE,), self.values.shape)
        if self.values[needed:].count_nonzero():
            raise ModelError(f"values: the last {PADDING} must be zeros of padding; the file is damaged")
        super().check()

    def prepare(self) -> None:
        # A copy: loaded tensors are parts of a mapped file, and what is written into that later must not move a kernel.
        self._buffers[self.PACKED[1]] = self.stored.clone()
        super().prepare()


class MaskedInt8Linear(MaskedLinear):
    """Values are levels."""

    KIND = "int8"
    TYPE = torch.int8
    TOLERANCE = 1 / LARGEST
    LARGEST_ERROR = MOVES_MUCH[8]

    @classmethod
    def levels_of(cls, tensors: Sequence[Tensor], columns: int) -> Tensor:
        return bitmask.unpack(cls.mask_of(tensors[1]), tensors[2], columns)

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return cls.stored_of(words(keep)), _padded(levels[keep])

    @staticmethod
    def bytes_needed(mask: Tensor) -> int:
        return int(row_counts(mask).sum())

    def cut(self, rows: range, columns: range) -> Self:
        scales = self.cut_scales(rows, columns)
        mask, values = bitmask.cut(self.mask_of(self.stored), self.values, self.in_features, rows, columns)
        layer = self.holding((len(rows), len(columns)), scales, self.stored_of(mask), values)
        layer.like = self.like
        return layer

    def check(self) -> None:
        super().check()
        if bool((self.values < -LARGEST).any()):
            raise ModelError(f"values: a level is below -{LARGEST}; the file is damaged")


class MaskedInt4Linear(MaskedLinear):
    """Values are places in a table.

    Attributes:
        levels: the table of 16 levels: one for the layer, [1, 16], or, where layers were stacked, one for each row.
    """

    KIND = "int4"
    GROUP = 64
    TYPE = torch.uint8
    TOLERANCE = 0.5
    LARGEST_ERROR = MOVES_MUCH[4]
    levels: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        table = torch.empty(1, LEVELS[self.KIND], dtype=torch.int8, device=self.scales.device)
        self.register_buffer("levels", table)

    @classmethod
    def levels_of(cls, tensors: Sequence[Tensor], columns: int) -> Tensor:
        _, stored, values, table, *_ = tensors
        mask = cls.mask_of(stored)
        alive = bits(mask, columns)
        places = unpack_places(mask, values).int()
        rows = torch.arange(len(mask), device=mask.device).repeat_interleave(row_counts(mask)) if len(table) > 1 else 0
        levels = table.new_zeros(alive.shape)
        levels[alive] = table[rows, places]
        return levels

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        mask = words(keep)
        places = torch.searchsorted(table, levels[keep].contiguous()).to(torch.uint8)
        return cls.stored_of(mask), pack_places(mask, places), table.unsqueeze(0).contiguous()

    @staticmethod
    def bytes_needed(mask: Tensor) -> int:
        return place_bytes(mask)

    @classmethod
    def joined_tables(cls, layers: Sequence[Self]) -> tuple[Tensor, ...]:
        if len({tuple(layer.levels.flatten().tolist()) for layer in layers}) == 1:
            return (layers[0].levels.clone(),)
        return (torch.cat([layer.levels.expand(layer.out_features, -1) for layer in layers]),)

    def cut(self, rows: range, columns: range) -> Self:
        scales = self.cut_scales(rows, columns)
        whole = self.mask_of(self.stored)
        mask, kept = bitmask.cut(whole, _padded(unpack_places(whole, self.values)), self.in_features, rows, columns)
        table = self.levels if len(self.levels) == 1 else self.levels[rows.start : rows.stop]
        values = pack_places(mask, kept[: len(kept) - PADDING])
        layer = self.holding((len(rows), len(columns)), scales, self.stored_of(mask), values, table.clone())
        layer.like = self.like
        return layer

    def table(self) -> Tensor:
        return self.levels[0]

    def check(self) -> None:
        tables = self.out_features if self.levels.dim() == 2 and len(self.levels) > 1 else 1
        check_tensor("levels", self.levels, (torch.int8,), (tables, LEVELS[self.KIND]))
        if bool((self.levels[:, 1:] <= self.levels[:, :-1]).any()) or bool((self.levels < -LARGEST).any()):
            raise ModelError(f"levels: they do not increase from -{LARGEST} or more; the file is damaged")
        super().check()
