"""The `bitmask` layout: one bit for each weight, and the nonzeros packed in order. Any pattern.

Rows of the mask are whole 64-bit words: bit b of word w is column 64·w + b. The values are followed by
`PADDING` zeros, so that kernels may load whole vectors past the end. At 50 % the layout takes 17/32 of dense in
32 bit and 9/16 in 16 bit.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import PADDING, WORD, bits, row_counts, row_starts, words
from gblm_compress.layouts.bitmask_cpu import crossover, linear_many
from gblm_compress.layouts.packed import DTYPES, check_tensor
from gblm_compress.layouts.packed_linear import PackedLinear, operator

_INTEGER_OF = {4: torch.int32, 2: torch.int16}


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a matrix.

    Args:
        weight: [rows, columns] in float32, float16 or bfloat16.

    Returns:
        mask [rows, ceil(columns / 64)] in int64, and values [nonzeros + PADDING] in the dtype of `weight`. What has a
        bit is everything but +0.0, so that the round trip is exact even for -0.0.
    """
    alive = weight.contiguous().view(_INTEGER_OF[weight.element_size()]) != 0
    return words(alive), _padded(weight[alive])


def _padded(*values: Tensor) -> Tensor:
    return torch.cat([*values, values[0].new_zeros(PADDING)])


def unpack(mask: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense matrix [rows, columns] of `pack`, bit for bit."""
    alive = bits(mask, columns)
    dense = values.new_zeros(alive.shape)
    dense[alive] = values[: values.numel() - PADDING]
    return dense


def stack(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Packed matrices of as many columns each, one below the other, in memory of their own."""
    masks, values = zip(*parts, strict=True)
    return torch.cat(masks), _padded(*(stored[: len(stored) - PADDING] for stored in values))


def cut(mask: Tensor, values: Tensor, columns: int, kept_rows: range, kept_columns: range) -> tuple[Tensor, Tensor]:
    """Some rows and columns, each without gaps, of a packed matrix that passes `check`, in memory of their own."""
    counts = row_counts(mask)
    first = int(counts[: kept_rows.start].sum())
    rows = slice(kept_rows.start, kept_rows.stop)
    mask, values = mask[rows], values[first : first + int(counts[rows].sum())]
    if kept_columns != range(columns):
        alive = bits(mask, columns)
        kept = torch.zeros(columns, dtype=torch.bool, device=mask.device)
        kept[kept_columns.start : kept_columns.stop] = True
        values = values[kept.expand_as(alive)[alive]]
        mask = words(alive[:, kept_columns.start : kept_columns.stop])
    return mask.clone(), _padded(values)


def check(mask: Tensor, values: Tensor, shape: Sequence[int]) -> None:
    """Hold two tensors against the layout of a matrix of that shape; what passes, kernels may read.

    A stored value may be zero, of either sign: weights become zero when they are cast to a narrower dtype.

    Raises:
        ModelError: they are no such matrix; the message begins with the tensor's name.
    """
    check_mask(mask, shape)
    nonzeros = int(row_counts(mask).sum())
    if values.dim() != 1 or len(values) != nonzeros + PADDING:
        raise ModelError(
            f"values: shape {list(values.shape)}; the mask has {nonzeros} bits, which takes [{nonzeros + PADDING}]: "
            f"one for each, and {PADDING} zeros of padding"
        )
    check_tensor("values", values, DTYPES, values.shape)
    if values[nonzeros:].count_nonzero():
        raise ModelError(f"values: the last {PADDING} must be zeros of padding; the file is damaged")


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raises:
    ModelError: it is no mask of a matrix of that shape.
    """
    rows, columns = shape
    check_tensor("mask", mask, (torch.int64,), (rows, -(-columns // WORD)))
    in_last = columns % WORD
    if in_last and (outside := int((mask[:, -1] & (-1 << in_last)).count_nonzero())):
        raise ModelError(f"mask: {outside} rows have bits beyond the last of {columns} columns; the file is damaged")


def _linear_cpu(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, rows: int, columns: int, crossover: int, plan: str = ""
) -> Tensor:
    mask, values, starts = tensors
    flat = x.reshape(-1, columns)
    if not cpu.available():
        y = flat @ unpack(mask, values, columns).T
    elif 0 < flat.shape[0] <= crossover:
        y = cpu.linear(flat, mask, values, starts)
    else:
        y = linear_many(flat, mask, values, starts)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], rows)


def linear_cuda(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, rows: int, columns: int, crossover: int, plan: str
) -> Tensor:
    mask, values, starts = tensors
    if not plan:
        return nn.functional.linear(x, unpack(mask, values, columns), bias)
    from gblm_compress.kernels.gpu import Packed
    from gblm_compress.layouts import cuda_linear

    weight = Packed("bitmask", values, mask, starts, (rows, columns))
    return cuda_linear.linear(x, weight, bias, plan)


class BitmaskLinear(PackedLinear):
    """A `PackedLinear` in the bitmask layout.

    Args:
        nonzeros: how many weights are stored.

    Attributes:
        mask, values: as `pack` makes them.
        starts: where each row's values begin, or on CUDA those of each block of columns.
    """

    LAYOUT = "bitmask"
    PACKED = ("mask", "values")
    DERIVED = ("starts",)
    OPERATOR = operator("bitmask_linear", _linear_cpu, linear_cuda)
    mask: Tensor
    values: Tensor
    starts: Tensor

    def __init__(
        self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None, *, nonzeros: int
    ) -> None:
        super().__init__(shape, bias, dtype, device)
        if type(nonzeros) is not int or not 0 <= nonzeros <= self.out_features * self.in_features:
            raise ModelError(f"nonzeros {nonzeros!r} is no number of weights of a matrix of shape {list(shape)}")
        words = -(-self.in_features // WORD)
        self.register_buffer("mask", torch.empty(self.out_features, words, dtype=torch.int64, device=device))
        self.register_buffer("values", torch.empty(nonzeros + PADDING, dtype=dtype, device=device))

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        return 1, width

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> Self:
        return cls.holding(weight.shape, *pack(weight)).filled(bias)

    @classmethod
    def holding(cls, shape: Sequence[int], *packed: Tensor, **sizes: Any) -> Self:
        return super().holding(shape, *packed, **sizes, nonzeros=packed[1].numel() - PADDING)

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
        return cls.holding(shape, *stack([(layer.mask, layer.values) for layer in layers]))

    def cut(self, rows: range, columns: range) -> Self:
        return self.holding((len(rows), len(columns)), *cut(self.mask, self.values, self.in_features, rows, columns))

    def description(self) -> dict[str, Any]:
        return {**super().description(), "nonzeros": self.values.numel() - PADDING}

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self._prepared:
            self.prepare()
        # The registered operator is for tracing; called through it, Python's share of a decode step doubles.
        eager = not torch.compiler.is_compiling() and type(x) is Tensor and not x.requires_grad
        if eager and self._on_cpu and x.is_cpu:
            tensors = (self.mask, self.values, self.starts)
            return _linear_cpu(x, tensors, bias, self.out_features, self.in_features, self.crossover)
        return super().product(x, bias)

    def check(self) -> None:
        check(self.mask, self.values, (self.out_features, self.in_features))
        super().check()

    def prepare(self) -> None:
        # A copy: loaded tensors are parts of a mapped file, and what is written into that later must not move a kernel.
        self._buffers["mask"] = self.mask.clone()
        super().prepare()

    def find_kernels(self) -> None:
        self._on_cpu = self.mask.device.type == "cpu"
        self.starts = row_starts(self.mask)
        if self._on_cpu and cpu.available():
            self.crossover = crossover(self.mask, self.values, self.starts, self.in_features)
        elif cuda := self.cuda_kernels():
            self.starts = cuda.gpu.block_starts(self.mask)
            shape = (self.out_features, self.in_features)
            self.plan = cuda.plan(cuda.gpu.Packed("bitmask", self.values, self.mask, self.starts, shape))

    def kernel(self, tokens: int) -> str:
        if not self._prepared:
            self.prepare()
        if not (self._on_cpu and cpu.available()):
            return super().kernel(tokens)
        path = cpu.path(self.values.dtype)
        if tokens <= self.crossover:
            return f"bitmask {path}"
        many = cpu.has_many(self.values.dtype, path)
        return f"bitmask {path}, many tokens" if many else "expanded tiles and dense GEMM"

    def dense_weight(self) -> Tensor:
        return unpack(self.mask, self.values, self.in_features)

    def extra_repr(self) -> str:
        density = (self.values.numel() - PADDING) / (self.in_features * self.out_features)
        return f"{super().extra_repr()}, density={density:.3f}"
