"""The layout `int8`: every weight as a level of 8 bits, and scales. For weights without zeros, such as heads."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels.cpu_quantised import Quantised
from gblm_compress.kernels.masks import WORD
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.layouts.packed_linear import MOVES_MUCH
from gblm_compress.layouts.quantised import QuantisedLinear, scale_of
from gblm_compress.methods.quantisation import LARGEST


class Int8Linear(QuantisedLinear):
    """A `PackedLinear` in the int8 layout.

    Attributes:
        values: the levels, [rows, columns].
    """

    LAYOUT = "int8"
    KIND = "int8"
    PACKED = ("scales", "values")
    DERIVED = ("sums", "like")
    TOLERANCE = 1 / LARGEST
    LARGEST_ERROR = MOVES_MUCH[8]
    values: Tensor

    def __init__(
        self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None, group: int | None = None
    ) -> None:
        super().__init__(shape, bias, dtype, device, group)
        self.register_buffer("values", torch.empty(tuple(shape), dtype=torch.int8, device=device))

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 8, 0

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return (levels.contiguous(),)

    @classmethod
    def levels_of(cls, tensors: Sequence[Tensor], columns: int) -> Tensor:
        return tensors[1]

    @classmethod
    def kernel_weight(cls, tensors: Sequence[Tensor], columns: int) -> Quantised:
        weight = super().kernel_weight(tensors, columns)
        if not columns % WORD:
            return weight
        return replace(weight, values=torch.nn.functional.pad(weight.values, (0, -columns % WORD)))  # whole words

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
        values = torch.cat([layer.values for layer in layers])
        whole = cls.holding(shape, cls.joined_scales(layers), values)
        whole.like = layers[0].like
        return whole

    def cut(self, rows: range, columns: range) -> Self:
        scales = self.cut_scales(rows, columns)
        values = self.values[rows.start : rows.stop, columns.start : columns.stop].clone()
        layer = self.holding((len(rows), len(columns)), scales, values)
        layer.like = self.like
        return layer

    def look_up(self, numbers: Tensor) -> Tensor:
        if not self._prepared:
            self.prepare()
        chosen = numbers.flatten()
        rows = self.values[chosen] * scale_of(self.scales[chosen], self.in_features)
        return rows.to(self.dtype).reshape(*numbers.shape, self.in_features)

    def check(self) -> None:
        check_tensor("values", self.values, (torch.int8,), (self.out_features, self.in_features))
        if bool((self.values < -LARGEST).any()):
            raise ModelError(f"values: a level is below -{LARGEST}; the file is damaged")
        super().check()
