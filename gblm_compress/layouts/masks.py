"""Kinds of masks: they mark the weights that a layout stores. Values are in column order.

All but `Whole` have a buffer, and convert to words of 64 bits, see `kernels.masks`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels import masks
from gblm_compress.kernels.masks import PADDING, WORD, bits
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.methods.patterns import Pattern

_INTEGER_OF = {4: torch.int32, 2: torch.int16}
Shape = Sequence[int]  # (rows, columns) of a weight


class Mask(ABC):
    name: str | None  # of the buffer; None if all weights are stored
    dtype = torch.uint8  # of the buffer
    stored: str  # a key of `gpu.TILINGS`
    fills = False  # whether groups with fewer nonzeros store zeros, so that the shape alone gives the size

    @abstractmethod
    def buffers(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """{name: shape} of the buffer, if there is one; ModelError if rows cannot have that length."""

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        """The shape of `count` stored values."""
        return (count + PADDING,)

    @abstractmethod
    def choose(self, weight: Tensor) -> Tensor:
        """The stored ones of [rows, columns] weights or booleans, as booleans; UsageError if no mask fits them."""

    def from_words(self, mask: Tensor, columns: int) -> Tensor:
        """The buffer of a mask [rows, words]."""
        return mask

    def to_words(self, buffer: Tensor) -> Tensor:
        """The mask [rows, words] of a buffer."""
        return buffer

    def hold(self, values: Tensor, shape: Shape) -> Tensor:
        """Values [stored], padded because kernels load whole vectors past the end."""
        made = self.values_shape(shape, len(values))
        return torch.nn.functional.pad(values, (0, PADDING)) if len(made) == 1 else values.reshape(made)

    def flat(self, values: Tensor) -> Tensor:
        """The values [stored] without their padding."""
        return values[: len(values) - PADDING] if values.dim() == 1 else values.reshape(-1)

    def spread(self, buffer: Tensor, values: Tensor, columns: int) -> Tensor:
        """The dense matrix of values [stored]."""
        alive = bits(self.to_words(buffer), columns)
        return values.new_zeros(alive.shape).masked_scatter_(alive, values)

    def check(self, buffer: Tensor, shape: Shape) -> None:
        """ModelError, beginning with the buffer's name, if it does not fit a matrix of that shape."""
        for name, needed in self.buffers(shape).items():
            check_tensor(name, buffer, (self.dtype,), needed)

    def check_values(self, values: Tensor, dtypes: Sequence[torch.dtype], shape: Shape, count: int) -> None:
        """ModelError, beginning with "values", if the values do not fit the mask."""
        needed = self.values_shape(shape, count)
        if len(needed) == 1 and values.shape != needed:
            raise ModelError(
                f"values: shape {list(values.shape)}; the mask takes {list(needed)}: {count} values, and {PADDING} "
                "zeros of padding"
            )
        check_tensor("values", values, dtypes, needed)
        if len(needed) == 1 and values[count:].count_nonzero():
            raise ModelError(f"values: the last {PADDING} must be zeros of padding; the file is damaged")


class Bitmask(Mask):
    """One bit for each weight, in words of 64. Any pattern."""

    name = "mask"
    dtype = torch.int64
    stored = "mask"

    def buffers(self, shape: Shape) -> dict[str, tuple[int, int]]:
        return {self.name: (shape[0], -(-shape[1] // WORD))}

    def choose(self, weight: Tensor) -> Tensor:
        """Everything but +0.0, so that the round trip is exact even for -0.0."""
        if weight.dtype is torch.bool:
            return weight
        return weight.contiguous().view(_INTEGER_OF[weight.element_size()]) != 0

    def check(self, buffer: Tensor, shape: Shape) -> None:
        super().check(buffer, shape)
        in_last = shape[1] % WORD
        if in_last and (outside := int((buffer[:, -1] & (-1 << in_last)).count_nonzero())):
            raise ModelError(
                f"mask: {outside} rows have bits beyond the last of {shape[1]} columns; the file is damaged"
            )


class _TwoOfFour(Mask):
    """Two weights of every four columns; groups with fewer nonzeros store zeros at the first free positions."""

    stored = "two of four"
    fills = True

    def choose(self, weight: Tensor) -> Tensor:
        if violation := Pattern("2:4").first_violation(weight):
            raise UsageError(f"the matrix is not 2:4: {violation}")
        groups = weight.reshape(len(weight), -1, 4)
        # Stable, so that nonzeros come first and each kind stays in order.
        chosen = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True).reshape(weight.shape)

    def _check_groups(self, shape: Shape) -> None:
        if shape[1] % 4:
            raise ModelError(f"shape: {shape[1]} columns are not a multiple of 4, which a 2:4 layout needs")


@cache
def _bytes_of_positions() -> tuple[int, ...]:
    """The byte of the mask for every byte of positions; 0 if a group's positions do not increase."""
    pairs = {first | second << 2: 1 << first | 1 << second for second in range(4) for first in range(second)}
    return tuple(pairs.get(byte & 15, 0) | pairs.get(byte >> 4, 0) << 4 for byte in range(256))


@cache
def _positions_of_bytes() -> tuple[int, ...]:
    groups = {mask: position for position, mask in enumerate(_bytes_of_positions()[:16]) if mask}
    return tuple(groups.get(byte & 15, 0) | groups.get(byte >> 4, 0) << 4 for byte in range(256))


class Positions(_TwoOfFour):
    """Two increasing 2-bit positions for every four columns; a byte has two groups, the first in its low half."""

    name = "positions"

    def buffers(self, shape: Shape) -> dict[str, tuple[int, int]]:
        self._check_groups(shape)
        return {self.name: (shape[0], -(-shape[1] // 8))}

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        return shape[0], shape[1] // 2

    def from_words(self, mask: Tensor, columns: int) -> Tensor:
        table = torch.tensor(_positions_of_bytes(), dtype=torch.uint8, device=mask.device)
        return table[mask.view(torch.uint8)[:, : -(-columns // 8)].int()]

    def to_words(self, buffer: Tensor) -> Tensor:
        table = torch.tensor(_bytes_of_positions(), dtype=torch.uint8, device=buffer.device)
        bytes_of_8 = table[buffer.int()]
        return torch.nn.functional.pad(bytes_of_8, (0, -bytes_of_8.shape[1] % 8)).view(torch.int64)

    def check(self, buffer: Tensor, shape: Shape) -> None:
        super().check(buffer, shape)
        low = (buffer & 3) < ((buffer >> 2) & 3)
        high = ((buffer >> 4) & 3) < (buffer >> 6)
        if shape[1] % 8:
            high[:, -1] = buffer[:, -1] >> 4 == 0
        if bad := int((~(low & high)).sum()):
            raise ModelError(f"positions: {bad} bytes lack two increasing positions in each group; the file is damaged")


class Patterns(_TwoOfFour):
    """The first three bits of the mask of four columns; the fourth is their parity."""

    name = "patterns"

    def buffers(self, shape: Shape) -> dict[str, tuple[int, int]]:
        self._check_groups(shape)
        return {self.name: (shape[0], -(-shape[1] // WORD) * masks.PATTERN_BYTES)}

    def from_words(self, mask: Tensor, columns: int) -> Tensor:
        return masks.to_patterns(mask)

    def to_words(self, buffer: Tensor) -> Tensor:
        return masks.from_patterns(buffer)

    def check(self, buffer: Tensor, shape: Shape) -> None:
        super().check(buffer, shape)
        codes, groups = masks.pattern_codes(buffer), shape[1] // 4
        bad = int(((codes[:, :groups] == 0) | (codes[:, :groups] == 7)).sum() + codes[:, groups:].count_nonzero())
        if bad:
            raise ModelError(f"patterns: {bad} codes do not mark two of four columns; the file is damaged")


class Whole(Mask):
    """No mask: all weights are stored, [rows, columns]."""

    name = None
    stored = "all"

    def buffers(self, shape: Shape) -> dict[str, tuple[int, int]]:
        return {}

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        return tuple(shape)

    def choose(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight, dtype=torch.bool)

    def spread(self, buffer: Tensor, values: Tensor, columns: int) -> Tensor:
        return values.reshape(-1, columns)
