"""What layers of quantised weights share: scales beside levels, which kernels run, and how they are checked.

Scales are stored as the bits of float16 in int16, so that casting a model to another dtype leaves them as they are.
The dtype of a layer is that of its inputs and outputs alone.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels import cpu
from gblm_compress.kernels.cpu_quantised import MOST_COLUMNS, Quantised
from gblm_compress.layouts.packed import check_tensor, same_bits
from gblm_compress.layouts.packed_linear import PackedLinear, operator
from gblm_compress.layouts.quantised_cpu import crossover, linear
from gblm_compress.methods.quantisation import GROUPS, LARGEST, LEVELS, Grid, make_grid, nearest
from gblm_compress.methods.quantisation import rounded as on_grid

_INFINITE = 0x7C00  # float16 as bits: what is not finite has these or more, what is negative is a negative int16


def groups_of(columns: int, group: int | None) -> int:
    """How many scales a row has."""
    return 1 if group is None else -(-columns // group)


def group_of(columns: int, groups: int) -> int | None:
    """How many columns share a scale where a row has so many scales; None for all of a row.

    Raises:
        ModelError: rows cannot have so many.
    """
    found = [group for group in (None, *GROUPS) if groups_of(columns, group) == groups]
    if not found:
        raise ModelError(f"scales: {groups} for each row; rows of {columns} columns have no such number of groups")
    return found[0]


def scale_of(scales: Tensor, columns: int) -> Tensor:
    """The scale of every weight, in float32: [rows, columns], or [rows, 1] where a row has one."""
    halves = scales.view(torch.float16)
    return Grid(halves, halves, group_of(columns, scales.shape[1])).scale_of(columns)


def row_sums(levels: Tensor, scales: Tensor) -> Tensor:
    """What kernels subtract [rows]: Σ scale · level of a row, or Σ level where the row has one scale; in float32."""
    rows, columns = levels.shape
    group = group_of(columns, scales.shape[1])
    if group is None:
        return levels.sum(1, dtype=torch.int64).float()
    sums = nn.functional.pad(levels, (0, -columns % group)).reshape(rows, -1, group).sum(-1, dtype=torch.int64)
    return (sums * scales.view(torch.float16).double()).sum(1).float()


class QuantisedLinear(PackedLinear):
    """A `PackedLinear` whose weights are scale · level. A subclass says how levels are stored.

    Args:
        group: columns that share a scale; None where all of a row do.

    Attributes:
        KIND: of `methods.quantisation.LEVELS`.
        GROUP: columns that share a scale where nothing else is asked for; None for all of a row.
        PACKED: the scales first.
        DERIVED: `like` last.
        scales: [rows, groups], the bits of float16 as int16.
        sums: [rows], as `row_sums` makes them.
        like: nothing, in the dtype of inputs and outputs.
    """

    KIND: ClassVar[str]
    GROUP: ClassVar[int | None] = None
    scales: Tensor
    sums: Tensor
    like: Tensor

    def __init_subclass__(cls) -> None:
        if "LAYOUT" in vars(cls):
            cls.OPERATOR = operator(f"{cls.LAYOUT.replace('-', '_')}_linear", cls.linear_cpu, cls.linear_cuda)

    def __init__(
        self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None, group: int | None = None
    ) -> None:
        super().__init__(shape, bias, dtype, device)
        if group is not None and (type(group) is not int or group not in GROUPS):
            raise ModelError(f"group {group!r} is none of {', '.join(map(str, GROUPS))}, nor null for whole rows")
        self.group = group
        size = (self.out_features, groups_of(self.in_features, group))
        self.register_buffer("scales", torch.empty(size, dtype=torch.int16, device=device))
        self.like = torch.empty(0, dtype=dtype)

    @classmethod
    def pack(cls, levels: Tensor, keep: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `PACKED` after the scales.

        Args:
            levels: [rows, columns] in int8.
            keep: which are stored, [rows, columns].
            table: the levels that there are, increasing.
        """
        raise NotImplementedError

    @staticmethod
    def joined_scales(layers: Sequence["QuantisedLinear"]) -> Tensor:
        """The scales of layers, one below the other.

        Raises:
            UsageError: they belong to different numbers of columns.
        """
        if len({layer.scales.shape[1] for layer in layers}) > 1:
            raise UsageError(
                "layers that an engine merges have scales for different numbers of columns; export with the --group "
                "that all of them take"
            )
        return torch.cat([layer.scales for layer in layers])

    @classmethod
    def levels_of(cls, tensors: Sequence[Tensor], columns: int) -> Tensor:
        """All levels, [rows, columns] in int8, of the tensors of `PACKED`; zeros where none is stored."""
        raise NotImplementedError

    @classmethod
    def kernel_weight(cls, tensors: Sequence[Tensor], columns: int) -> Quantised:
        """The weight as kernels of a CPU read it, of the tensors of `PACKED` and `DERIVED`, which have its names."""
        held = dict(zip((*cls.PACKED, *cls.DERIVED[:-1]), tensors, strict=False))
        return Quantised(columns=columns, group=group_of(columns, held["scales"].shape[1]) or 0, **held)

    @classmethod
    def gpu_weight(cls, tensors: Sequence[Tensor], columns: int) -> Any:
        """The weight as kernels of a GPU read it, `gpu.Packed`, of the same tensors."""
        from gblm_compress.kernels.gpu import Packed

        held = dict(zip((*cls.PACKED, *cls.DERIVED), tensors, strict=True))
        scales, values = held["scales"], held["values"]
        return Packed(
            cls.LAYOUT,
            values,
            held[cls.PACKED[1]],  # what says which are stored
            held.get("starts", values),
            (len(scales), columns),
            scales,
            held.get("levels"),
            group_of(columns, scales.shape[1]) or 0,
            held["like"].dtype,
        )

    @classmethod
    def linear_cpu(
        cls,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        rows: int,
        columns: int,
        crossover: int,
        plan: str,
    ) -> Tensor:
        """The product on a CPU, see `operator`."""
        if not crossover:
            return cls._unpacked(x, tensors, bias, columns)
        return linear(x, cls.kernel_weight(tensors, columns), bias, crossover, tensors[-1].dtype)

    @classmethod
    def linear_cuda(
        cls,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        rows: int,
        columns: int,
        crossover: int,
        plan: str,
    ) -> Tensor:
        """The product on CUDA, see `operator`."""
        if not plan:
            return cls._unpacked(x, tensors, bias, columns)
        from gblm_compress.layouts import cuda_linear

        return cuda_linear.linear(x, cls.gpu_weight(tensors, columns), bias, plan)

    @classmethod
    def _unpacked(cls, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, columns: int) -> Tensor:
        weight = cls.levels_of(tensors, columns) * scale_of(tensors[0], columns)
        return nn.functional.linear(x, weight.to(tensors[-1].dtype), bias)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, *, group: int | None = None, grid: Grid | None = None
    ) -> Self:
        """As `PackedLinear.from_dense`: every weight that is not zero becomes the nearest point of its grid.

        Args:
            group: columns that share a scale, where the grid is made here; `GROUP` if unset.
            grid: where the weights lie already, after a fit on it.
        """
        return cls.rounded(weight, group, grid).filled(bias)

    @classmethod
    def rounded(cls, weight: Tensor, group: int | None = None, grid: Grid | None = None) -> Self:
        """As `from_dense`, without bias and not prepared."""
        keep = weight != 0
        grid = grid or make_grid(weight.float(), keep, cls.KIND, group or cls.GROUP)
        levels = grid.levels[nearest(weight.float(), grid).int()]
        scales = grid.scales.contiguous().view(torch.int16)
        layer = cls.holding(weight.shape, scales, *cls.pack(levels, keep, grid.levels))
        layer.like = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return layer

    @classmethod
    def holds(cls, grid: Grid | None) -> bool:
        """Whether weights on that grid are stored as they are: it has no more levels than the layout."""
        return grid is not None and len(grid.levels) <= LEVELS[cls.KIND]

    @classmethod
    def holding(cls, shape: Sequence[int], *packed: Tensor, **sizes: Any) -> Self:
        groups = packed[0].shape[1] if packed[0].dim() == 2 else 0
        return super().holding(shape, *packed, **sizes, group=group_of(shape[1], groups))

    def cut_scales(self, rows: range, columns: range) -> Tensor:
        """The scales of some rows and columns.

        Raises:
            UsageError: the columns do not begin and end between groups.
        """
        scales, group = self.scales[rows.start : rows.stop], self.group
        if group is None or columns == range(self.in_features):
            return scales.clone()
        if columns.start % group or (columns.stop % group and columns.stop != self.in_features):
            raise UsageError(
                f"columns {columns.start} to {columns.stop - 1}: scales are shared by {group} columns, and the "
                f"{self.LAYOUT} layout can be cut at multiples of that only"
            )
        return scales[:, columns.start // group : -(-columns.stop // group)].contiguous()

    def description(self) -> dict[str, Any]:
        return {**super().description(), "group": self.group}

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def packed(self) -> list[Tensor]:
        """The tensors of `PACKED`."""
        return [self.get_buffer(name) for name in self.PACKED]

    @property
    def tensors(self) -> list[Tensor]:
        """Those of `PACKED` and `DERIVED`."""
        return [self.get_buffer(name) for name in (*self.PACKED, *self.DERIVED)]

    def for_gpu(self) -> Any:
        """`gpu_weight`; fills what of `DERIVED` it needs."""
        return self.gpu_weight(self.tensors, self.in_features)

    def table(self) -> Tensor:
        """The levels that weights may have."""
        return torch.arange(-LARGEST, LARGEST + 1, dtype=torch.int8, device=self.scales.device)

    def check(self) -> None:
        check_tensor(
            "scales", self.scales, (torch.int16,), (self.out_features, groups_of(self.in_features, self.group))
        )
        if not bool(((self.scales >= 0) & (self.scales < _INFINITE)).all()):
            raise ModelError("scales: not all are finite numbers of at least 0 in float16; the file is damaged")
        if not self.scales.any() and self.levels_of(self.packed, self.in_features).any():  # cast to int16, all are zero
            raise ModelError("scales: all are zero; the file is damaged, or they are not stored as int16")
        super().check()

    def find_kernels(self) -> None:
        self.sums = row_sums(self.levels_of(self.packed, self.in_features), self.scales)
        self.like = self.like.to(self.scales.device)
        self._weight: Quantised | None = None
        if cuda := self.cuda_kernels():
            self.plan = cuda.plan(self.for_gpu())
        elif self.scales.device.type == "cpu" and cpu.available() and self.in_features <= MOST_COLUMNS:
            self._weight = self.kernel_weight(self.tensors, self.in_features)
            self.crossover = crossover(self.LAYOUT, self._weight, self.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self._prepared:
            self.prepare()
        # As in `BitmaskLinear`: the registered operator is for tracing.
        eager = not torch.compiler.is_compiling() and type(x) is Tensor and not x.requires_grad
        if eager and self._weight is not None and x.is_cpu:
            return linear(x, self._weight, bias, self.crossover, self.dtype)
        return super().product(x, bias)

    def kernel(self, tokens: int) -> str:
        if not self._prepared:
            self.prepare()
        if self._weight is None:
            return super().kernel(tokens)
        return f"{self.LAYOUT} {cpu.path(torch.int8)}" if tokens <= self.crossover else "restored tiles and dense GEMM"

    def dense_weight(self) -> Tensor:
        levels = self.levels_of(self.packed, self.in_features)
        return (levels * scale_of(self.scales, self.in_features)).to(self.dtype)

    def restores(self, weight: Tensor) -> bool:
        """Whether each weight of W is the nearest point of the grid to that of the matrix, and 0 where that is 0."""
        if (weight.shape, weight.dtype) != ((self.out_features, self.in_features), self.dtype):
            return False
        grid = Grid(self.scales.view(torch.float16), self.table(), self.group)
        return same_bits(self.dense_weight(), on_grid(weight.float(), weight != 0, grid).to(weight.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"
