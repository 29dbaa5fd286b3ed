"""The layouts `sparse24-int8` and `sparse24-int4`: patterns of a 2:4 matrix, levels of half its weights, scales.

A pattern takes 3 bits (`kernels.patterns`). A group with fewer than two nonzeros is filled up with zeros at free
positions, so that the layouts have one size: in groups of 64 columns 5 and 3 bits a weight.
"""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels import patterns
from gblm_compress.kernels.masks import PADDING, WORD
from gblm_compress.layouts import sparse24
from gblm_compress.layouts.masked import MaskedInt4Linear, MaskedInt8Linear, MaskedLinear
from gblm_compress.layouts.packed import check_tensor, same_bits


class _Sparse24(MaskedLinear):
    """The mask as patterns.

    Attributes:
        OF_BYTE: weights for which a byte of values is stored.
        patterns: [rows, words·6] in uint8.
    """

    DERIVED = ("sums", "like")
    OF_BYTE: ClassVar[int]
    patterns: Tensor

    def __init__(
        self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None, group: int | None = None
    ) -> None:
        super().__init__(shape, bias, dtype, device, group)
        sparse24.check_columns(self.in_features, self.LAYOUT)
        size = (self.out_features, -(-self.in_features // WORD) * patterns.BYTES)
        stored = self.out_features * self.in_features // self.OF_BYTE
        self.register_buffer("patterns", torch.empty(size, dtype=torch.uint8, device=device))
        self.register_buffer("values", torch.empty(stored + PADDING, dtype=self.TYPE, device=device))

    @staticmethod
    def mask_of(stored: Tensor) -> Tensor:
        return patterns.to_mask(stored)

    @staticmethod
    def stored_of(mask: Tensor) -> Tensor:
        return patterns.from_mask(mask)

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        chosen = sparse24.two_of_four(keep)
        stored = torch.zeros_like(keep).reshape(len(keep), -1, 4).scatter_(-1, chosen, True)
        filler = table[min(int((table < 0).sum()), len(table) - 1)]  # zero, or else what `error` finds
        return super().pack(torch.where(keep, levels, filler), stored.reshape(keep.shape), table)

    def cut(self, rows: range, columns: range) -> Self:
        sparse24.check_cut(columns, self.LAYOUT)
        return super().cut(rows, columns)

    def error(self, weight: Tensor) -> float:
        """As of any layout; infinite where a group of four would need a zero and the table has none."""
        zeros = self.dense_weight()[weight == 0]
        return super().error(weight) if same_bits(zeros, torch.zeros_like(zeros)) else float("inf")

    def check_stored(self) -> None:
        words = -(-self.in_features // WORD)
        check_tensor("patterns", self.patterns, (torch.uint8,), (self.out_features, words * patterns.BYTES))
        codes, groups = patterns.codes(self.patterns), self.in_features // 4
        bad = int(((codes[:, :groups] == 0) | (codes[:, :groups] == 7)).sum() + codes[:, groups:].count_nonzero())
        if bad:
            raise ModelError(f"patterns: {bad} codes do not stand for two of four columns; the file is damaged")


class Sparse24Int8Linear(_Sparse24, MaskedInt8Linear):
    """A `PackedLinear` in the sparse24-int8 layout."""

    LAYOUT = "sparse24-int8"
    PACKED = ("scales", "patterns", "values")
    OF_BYTE = 2

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 5, 0


class Sparse24Int4Linear(_Sparse24, MaskedInt4Linear):
    """A `PackedLinear` in the sparse24-int4 layout."""

    LAYOUT = "sparse24-int4"
    PACKED = ("scales", "patterns", "values", "levels")
    OF_BYTE = 4

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 3, 0
