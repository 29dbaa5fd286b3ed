"""The layouts `bitmask-int8` and `bitmask-int4`: one bit for each weight, the levels of the nonzeros, and scales.

The mask is that of the `bitmask` layout. In groups of 64 columns at 50 % they take 5.25 and about 3.3 bits a weight.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels.masks import PADDING, WORD, row_counts, row_starts
from gblm_compress.layouts.bitmask import check_mask
from gblm_compress.layouts.masked import MaskedInt4Linear, MaskedInt8Linear, MaskedLinear, bytes_before


class _Bitmask(MaskedLinear):
    """The mask as it is.

    Args:
        stored: bytes of the values, without padding.

    Attributes:
        mask: as in the bitmask layout.
        starts: `row_starts`, or on CUDA where each block of columns begins.
    """

    DERIVED = ("starts", "sums", "like")
    mask: Tensor
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

    @staticmethod
    def mask_of(stored: Tensor) -> Tensor:
        return stored

    @staticmethod
    def stored_of(mask: Tensor) -> Tensor:
        return mask

    @classmethod
    def holding(cls, shape: Sequence[int], *packed: Tensor, **sizes: Any) -> Self:
        return super().holding(shape, *packed, **sizes, stored=max(0, packed[2].numel() - PADDING))

    def description(self) -> dict[str, Any]:
        return {**super().description(), "stored": self.values.numel() - PADDING}

    def check_stored(self) -> None:
        check_mask(self.mask, (self.out_features, self.in_features))

    def find_kernels(self) -> None:
        self.starts = self.row_starts(self.mask)
        super().find_kernels()

    def for_gpu(self) -> Any:
        from gblm_compress.kernels import gpu

        self.starts = gpu.block_starts(self.mask, whole_bytes=self.KIND == "int4")
        return super().for_gpu()

    @staticmethod
    def row_starts(mask: Tensor) -> Tensor:
        """At which byte the values of each row begin [rows]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        density = int(row_counts(self.mask).sum()) / (self.in_features * self.out_features)
        return f"{super().extra_repr()}, density={density:.3f}"


class BitmaskInt8Linear(_Bitmask, MaskedInt8Linear):
    """A `PackedLinear` in the bitmask-int8 layout."""

    LAYOUT = "bitmask-int8"
    PACKED = ("scales", "mask", "values")

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 1, 8

    row_starts = staticmethod(row_starts)


class BitmaskInt4Linear(_Bitmask, MaskedInt4Linear):
    """A `PackedLinear` in the bitmask-int4 layout."""

    LAYOUT = "bitmask-int4"
    PACKED = ("scales", "mask", "values", "levels")

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 1, 4

    @staticmethod
    def row_starts(mask: Tensor) -> Tensor:
        _, starts = bytes_before(mask)
        return starts.reshape(mask.shape)[:, 0].contiguous()
