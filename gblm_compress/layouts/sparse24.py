"""The `sparse24` layout: a 2:4 matrix as its values and the 2-bit position of each within its group of four.

Two values are stored for every four weights, in order of position. The positions of one group take 4 bits,
low pair first; two groups share a byte, the first in the low half. A group with fewer than two nonzeros is
filled up with zeros at free positions, so that the layout has one size: 9/16 of dense in 16 bit, 17/32 in
32 bit.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.layouts.packed import DTYPES, check_tensor
from gblm_compress.layouts.packed_linear import PackedLinear, operator
from gblm_compress.methods.patterns import Pattern

_PATTERN = Pattern("2:4")


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 matrix.

    Args:
        weight: [rows, columns], at most 2 nonzeros in every 4 consecutive columns, columns a multiple of 4.

    Returns:
        values [rows, columns / 2] in the dtype of `weight`, and positions [rows, ceil(columns / 8)] in uint8.

    Raises:
        UsageError: the matrix is not 2:4.
    """
    chosen = two_of_four(weight)
    rows, groups, _ = chosen.shape
    values = weight.reshape(rows, groups, 4).gather(-1, chosen).reshape(rows, groups * 2)
    nibbles = (chosen[..., 0] | (chosen[..., 1] << 2)).to(torch.uint8)
    return values.contiguous(), _bytes(nibbles)


def two_of_four(weight: Tensor) -> Tensor:
    """Which two of every four columns are stored, in order: [rows, columns / 4, 2].

    Args:
        weight: as of `pack`, or a mask.

    Raises:
        UsageError: the matrix is not 2:4.
    """
    if violation := _PATTERN.first_violation(weight):
        raise UsageError(f"the matrix is not 2:4: {violation}")
    groups = weight.reshape(len(weight), -1, 4)
    # Stable, so that nonzeros come first and each kind stays in order; then both in order of position.
    return (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values


def _bytes(nibbles: Tensor) -> Tensor:
    """The positions of each group [rows, groups], two to a byte."""
    even = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return (even[:, 0::2] | (even[:, 1::2] << 4)).contiguous()


def _nibbles(positions: Tensor, groups: int) -> Tensor:
    return torch.stack((positions & 0xF, positions >> 4), dim=-1).reshape(len(positions), -1)[:, :groups]


def unpack(values: Tensor, positions: Tensor) -> Tensor:
    """The dense matrix [rows, columns] of `pack`, bit for bit.

    Args:
        values: [rows, columns / 2].
        positions: [rows, ceil(columns / 8)], uint8.
    """
    rows, half = values.shape
    nibbles = _nibbles(positions, half // 2)
    chosen = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    dense = values.new_zeros(rows, half // 2, 4)
    dense.scatter_(-1, chosen, values.reshape(rows, half // 2, 2))
    return dense.reshape(rows, half * 2)


def stack(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Packed matrices of as many columns each, one below the other, in memory of their own."""
    values, positions = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(positions)


def cut(values: Tensor, positions: Tensor, kept_rows: range, kept_columns: range) -> tuple[Tensor, Tensor]:
    """Some rows and columns, each without gaps, of a packed matrix, in memory of their own.

    Raises:
        UsageError: the columns do not begin and end between groups of four.
    """
    check_cut(kept_columns, "sparse24")
    first, last = kept_columns.start, kept_columns.stop
    rows, groups = slice(kept_rows.start, kept_rows.stop), values.shape[1] // 2
    nibbles = _nibbles(positions[rows], groups)[:, first // 4 : last // 4]
    return values[rows, first // 2 : last // 2].clone(), _bytes(nibbles)


def check_cut(columns: range, layout: str) -> None:
    """Raises:
    UsageError: the columns do not begin and end between groups of four.
    """
    if columns.start % 4 or columns.stop % 4:
        raise UsageError(
            f"columns {columns.start} to {columns.stop - 1}: the {layout} layout can be cut at multiples of 4 only"
        )


def check_columns(columns: int, layout: str) -> None:
    """Raises:
    ModelError: rows of so many columns are no groups of four.
    """
    if columns % 4:
        raise ModelError(f"shape: {columns} columns are not a multiple of 4, which the {layout} layout needs")


def check(values: Tensor, positions: Tensor, shape: Sequence[int]) -> None:
    """Hold two tensors against the layout of a matrix of that shape; what passes, kernels may read.

    The two positions of a group are distinct and in order, so that each matrix has one form and no value is lost.

    Raises:
        ModelError: they are no such matrix; the message begins with the tensor's name.
    """
    rows, columns = shape
    check_columns(columns, "sparse24")
    check_tensor("values", values, DTYPES, (rows, columns // 2))
    check_tensor("positions", positions, (torch.uint8,), (rows, -(-columns // 8)))
    low = (positions & 3) < ((positions >> 2) & 3)
    high = ((positions >> 4) & 3) < (positions >> 6)
    if columns % 8:
        high[:, -1] = positions[:, -1] >> 4 == 0
    if not bool((low & high).all()):
        bad = int((~(low & high)).sum())
        raise ModelError(f"positions: {bad} bytes hold no two increasing positions in each group; the file is damaged")


def _linear_cpu(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, *_: Any) -> Tensor:
    return nn.functional.linear(x, unpack(*tensors[:2]), bias)


def linear_cuda(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, rows: int, columns: int, crossover: int, plan: str
) -> Tensor:
    values, positions, *operands = tensors
    if not plan:
        return nn.functional.linear(x, unpack(values, positions), bias)
    from gblm_compress.kernels.gpu import Packed
    from gblm_compress.layouts import cuda_linear

    weight = Packed("sparse24", values, positions, values, (rows, columns))
    return cuda_linear.linear(x, weight, bias, plan, cuda_linear.Operands(*operands))


class Sparse24Linear(PackedLinear):
    """A `PackedLinear` in the sparse24 layout.

    Attributes:
        values, positions: as `pack` makes them.
        cusparselt, cutlass: `cuda_linear.Operands`, each empty where no candidate of the plan needs it.
    """

    LAYOUT = "sparse24"
    PACKED = ("values", "positions")
    DERIVED = ("cusparselt", "cutlass")
    OPERATOR = operator("sparse24_linear", _linear_cpu, linear_cuda)
    values: Tensor
    positions: Tensor
    cusparselt: Tensor
    cutlass: Tensor

    def __init__(self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__(shape, bias, dtype, device)
        rows, columns = shape
        check_columns(columns, self.LAYOUT)
        self.register_buffer("values", torch.empty(rows, columns // 2, dtype=dtype, device=device))
        self.register_buffer("positions", torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=device))

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 1 + width // 2, 0

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> Self:
        return cls.holding(weight.shape, *pack(weight)).filled(bias)

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
        return cls.holding(shape, *stack([(layer.values, layer.positions) for layer in layers]))

    def cut(self, rows: range, columns: range) -> Self:
        return self.holding((len(rows), len(columns)), *cut(self.values, self.positions, rows, columns))

    def check(self) -> None:
        check(self.values, self.positions, (self.out_features, self.in_features))
        super().check()

    def find_kernels(self) -> None:
        self.cusparselt, self.cutlass = self.values.new_empty(0), self.values.new_empty(0)
        if cuda := self.cuda_kernels():
            shape = (self.out_features, self.in_features)
            weight = cuda.gpu.Packed("sparse24", self.values, self.positions, self.values, shape)
            self.plan = cuda.plan(weight)
            needed = {candidate.kernel for candidate in cuda.candidates(self.plan)}
            self.cusparselt, self.cutlass = cuda.operands(weight, needed)

    def dense_weight(self) -> Tensor:
        return unpack(self.values, self.positions)
