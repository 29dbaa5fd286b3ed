"""Kinds of masks: they mark the weights that a layout stores. Values are in column order.

All but `Whole` have a buffer, and convert to words of 64 bits, see `kernels.masks`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels.masks import PADDING, WORD, bits
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.methods.patterns import Pattern

# {two increasing positions of 2 bits: the bits that they mark}
_PAIRS = {first | second << 2: 1 << first | 1 << second for second in range(4) for first in range(second)}
Shape = Sequence[int]  # (rows, columns) of a weight


class Mask(ABC):
    name: str | None  # of the buffer; None if all weights are stored
    dtype = torch.uint8  # of the buffer
    piece: int  # columns that have an element of the buffer
    stored: str  # a key of `gpu.TILINGS`

    def buffer_shape(self, shape: Shape) -> tuple[int, int]:
        """The shape of the buffer; ModelError if rows cannot have that length."""
        return shape[0], -(-shape[1] // self.piece)

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
        check_tensor(f"{self.name}", buffer, (self.dtype,), self.buffer_shape(shape))

    def check_values(self, values: Tensor, dtypes: Sequence[torch.dtype], shape: Shape, count: int) -> None:
        """ModelError, beginning with "values", if the values do not fit the mask."""
        needed = self.values_shape(shape, count)
        check_tensor("values", values, dtypes, needed)
        if len(needed) == 1 and values[count:].count_nonzero():
            raise ModelError(f"values: the last {PADDING} must be zeros of padding; the file is damaged")


class Bitmask(Mask):
    """One bit for each weight, in words of 64. Any pattern."""

    name = "mask"
    dtype = torch.int64
    piece = WORD
    stored = "mask"

    def choose(self, weight: Tensor) -> Tensor:
        """Everything but +0.0, so that the round trip is exact even for -0.0."""
        if weight.dtype is torch.bool:
            return weight
        return weight.contiguous().view({4: torch.int32, 2: torch.int16}[weight.element_size()]) != 0

    def check(self, buffer: Tensor, shape: Shape) -> None:
        super().check(buffer, shape)
        in_last = shape[1] % WORD
        if in_last and (outside := int((buffer[:, -1] & (-1 << in_last)).count_nonzero())):
            raise ModelError(
                f"mask: {outside} rows have bits beyond the last of {shape[1]} columns; the file is damaged"
            )


def _replaced(halves: Tensor, by: dict[int, int]) -> Tensor:
    """Bytes with both of their halves replaced; 0 for others than these."""
    table = [by.get(byte & 15, 0) | by.get(byte >> 4, 0) << 4 for byte in range(256)]
    return torch.tensor(table, dtype=torch.uint8, device=halves.device)[halves.int()]


class Positions(Mask):
    """Two weights of every four columns; groups with fewer nonzeros store zeros at the first free positions.

    The buffer has two increasing 2-bit positions for every four columns; a byte has two groups, the first in its low
    half.
    """

    name = "positions"
    piece = 8
    stored = "two of four"

    def buffer_shape(self, shape: Shape) -> tuple[int, int]:
        if shape[1] % 4:
            raise ModelError(f"shape: {shape[1]} columns are not a multiple of 4, which a 2:4 layout needs")
        return super().buffer_shape(shape)

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        return shape[0], shape[1] // 2

    def choose(self, weight: Tensor) -> Tensor:
        if violation := Pattern("2:4").first_violation(weight):
            raise UsageError(f"the matrix is not 2:4: {violation}")
        groups = weight.reshape(len(weight), -1, 4)
        # Stable, so that nonzeros come first and each kind stays in order.
        chosen = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True).reshape(weight.shape)

    def from_words(self, mask: Tensor, columns: int) -> Tensor:
        bytes_of_8 = mask.view(torch.uint8)[:, : -(-columns // 8)]
        return _replaced(bytes_of_8, {marked: pair for pair, marked in _PAIRS.items()})

    def to_words(self, buffer: Tensor) -> Tensor:
        bytes_of_8 = _replaced(buffer, _PAIRS)
        return torch.nn.functional.pad(bytes_of_8, (0, -bytes_of_8.shape[1] % 8)).view(torch.int64)

    def check(self, buffer: Tensor, shape: Shape) -> None:
        super().check(buffer, shape)
        low = (buffer & 3) < ((buffer >> 2) & 3)
        high = ((buffer >> 4) & 3) < (buffer >> 6)
        if shape[1] % 8:
            high[:, -1] = buffer[:, -1] >> 4 == 0
        if bad := int((~(low & high)).sum()):
            raise ModelError(f"positions: {bad} bytes lack two increasing positions in each group; the file is damaged")


class Whole(Mask):
    """No mask: all weights are stored, [rows, columns]."""

    name = None
    stored = "all"

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        return tuple(shape)

    def choose(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight, dtype=torch.bool)

    def spread(self, buffer: Tensor, values: Tensor, columns: int) -> Tensor:
        return values.reshape(-1, columns)
