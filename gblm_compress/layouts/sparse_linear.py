"""`SparseLinear`: a linear layer that holds packed weights only, and chooses its kernel by device and token count.

`BitmaskLinear`, on a CPU: up to 8 tokens run on the sparse kernel for decoding, more on the one for many tokens.
Where a CPU has none of the latter for the dtype, more are computed in tiles: some rows are expanded into a buffer
that is used again and again, and multiplied by torch's dense GEMM. Where the one overtakes the other below 8 tokens
is measured once for each shape, dtype, thread count and machine, and kept in the cache folder.

`Sparse24Linear`, on a CPU: a dense product of the weight, unpacked for the call.

On CUDA, in 16 bit, both run what `cuda_linear` measured to be fastest; in 32 bit, and where Triton is not installed,
a dense product of the weight, unpacked for the call.
"""

import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError
from gblm_compress.kernels import cpu, masks
from gblm_compress.kernels.masks import PADDING, WORD
from gblm_compress.layouts import bitmask, sparse24
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.machine.measurements import remembered

TILE_BYTES = 8 << 20  # of an expanded tile: large enough for an efficient GEMM, small beside the model
_OPS: Any = torch.library.Library("gblm_compress", "DEF")  # type: ignore[no-untyped-call]
_OPS.define(
    "bitmask_linear(Tensor x, Tensor mask, Tensor values, Tensor starts, Tensor? bias, int columns, int crossover, "
    "str plan) -> Tensor"
)
_OPS.define(
    "sparse24_linear(Tensor x, Tensor values, Tensor positions, Tensor? bias, Tensor cusparselt, Tensor cutlass, "
    "str plan) -> Tensor"
)
UNPACKED = "dense product of the unpacked weight"


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W [out_features, in_features] packed. Inference only; a layout is a subclass.

    The packed tensors are checked before the first use and whenever others take their place: by loading, by
    `load_state_dict`, by moving the layer, by assignment. What is written into them in place is not noticed.

    Args:
        shape: (out_features, in_features).
        bias: whether there is one.
        dtype: of weight and bias.

    Attributes:
        transposed: whether the layer stands for one that stores its weight as [in_features, out_features].
        loading: whether transformers is filling it: `weight` has no values yet.

    Raises:
        ModelError: there is no such layer.
    """

    LAYOUT: ClassVar[str]
    PACKED: ClassVar[tuple[str, ...]]  # the buffers that hold the weight

    def __init__(self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__()
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise ModelError(f"shape {shape!r} is not one of a matrix: two whole numbers above 0 are needed")
        self.out_features, self.in_features = shape
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.plan = ""  # of `cuda_linear`; none elsewhere
        self.transposed = self.loading = False
        self._prepared = False

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """The sparse layer with the values of a dense one.

        Args:
            weight: [out_features, in_features].
            bias: [out_features].

        Raises:
            UsageError: the layout cannot hold the weight.
        """
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """The arguments, beside dtype and device, that make an empty layer of this size; plain values for JSON."""
        return {"shape": [self.out_features, self.in_features], "bias": self.bias is not None}

    def kernel(self, tokens: int) -> str:
        """The kernel that `forward` runs for that many tokens, in words."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """W, bit for bit."""
        raise NotImplementedError

    def check(self) -> None:
        """Hold the packed tensors against layout and shape.

        Raises:
            ModelError: they are no such weight; the message begins with the tensor's name.
        """
        if self.bias is not None:
            check_tensor("bias", self.bias, (self.get_buffer("values").dtype,), (self.out_features,))

    def prepare(self) -> None:
        """Make ready to run: check the packed weight, and find what follows from it and from the machine.

        Loading and moving the layer do it; `forward` does where it was filled by hand.

        Raises:
            ModelError: as for `check`.
        """
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W as the dense layer stores it, for models that read it: unpacked for the call, and theirs to keep.

        What is written into it is lost. While the layer is being loaded it has no values, and transformers, which would
        initialize it, takes it for done.
        """
        if self.loading:
            weight = self.get_buffer("values").new_empty(self.out_features, self.in_features, device="meta")
        else:
            if not self._prepared:
                self.prepare()
            weight = self.dense_weight()
        weight = weight.T if self.transposed else weight
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    @property
    def packed_bytes(self) -> int:
        """Bytes that the weight takes on disk."""
        return sum(self.get_buffer(name).nbytes for name in self.PACKED)

    @property
    def resident_bytes(self) -> int:
        """Bytes that the weight takes in memory, with all that `prepare` adds for the kernels of the device."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        prepared, self._prepared = self._prepared, False
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        if prepared and not self.get_buffer(self.PACKED[0]).is_meta:
            self.prepare()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.PACKED or name == "bias":
            self._prepared = False
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._prepared = False
        super()._load_from_state_dict(*arguments)

    def _take_bias(self, bias: Tensor | None) -> None:
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BitmaskLinear(SparseLinear):
    """A `SparseLinear` in the bitmask layout: any pattern.

    Args:
        nonzeros: how many weights are stored.
    """

    LAYOUT = "bitmask"
    PACKED = ("mask", "values")
    mask: Tensor
    values: Tensor
    starts: Tensor

    def __init__(
        self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None, *, nonzeros: int
    ) -> None:
        super().__init__(shape, bias, dtype, device)
        if type(nonzeros) is not int or not 0 <= nonzeros <= self.out_features * self.in_features:
            raise ModelError(f"nonzeros {nonzeros!r} is no number of weights of a matrix of shape {list(shape)}")
        self.crossover = 0
        words = -(-self.in_features // WORD)
        self.register_buffer("mask", torch.empty(self.out_features, words, dtype=torch.int64, device=device))
        self.register_buffer("values", torch.empty(nonzeros + PADDING, dtype=dtype, device=device))
        self.register_buffer("starts", torch.empty(0, dtype=torch.int64), persistent=False)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> Self:
        mask, values = bitmask.pack(weight)
        nonzeros = values.numel() - PADDING
        layer = cls(weight.shape, bias is not None, weight.dtype, "meta", nonzeros=nonzeros)
        layer.mask, layer.values = mask, values
        layer._take_bias(bias)
        layer.prepare()
        return layer

    def description(self) -> dict[str, Any]:
        return {**super().description(), "nonzeros": self.values.numel() - PADDING}

    def forward(self, x: Tensor) -> Tensor:
        if not self._prepared:
            self.prepare()
        # The registered operator is for tracing; called through it, Python's share of a decode step doubles.
        on_cpu = self._on_cpu and x.is_cpu
        direct = on_cpu and type(x) is Tensor and not x.requires_grad and not torch.compiler.is_compiling()
        linear = _bitmask_linear_cpu if direct else _bitmask_linear
        return linear(x, self.mask, self.values, self.starts, self.bias, self.in_features, self.crossover, self.plan)

    def check(self) -> None:
        bitmask.check(self.mask, self.values, (self.out_features, self.in_features))
        super().check()

    def prepare(self) -> None:
        """Check the weight; find where rows begin, and which kernel is the fastest for how many tokens."""
        # A copy: loaded tensors are parts of a mapped file, and what is written into that later must not move a kernel.
        self._buffers["mask"] = self.mask.clone()
        self.check()
        self._on_cpu = self.mask.device.type == "cpu"
        self.starts, self.crossover, self.plan = masks.row_starts(self.mask), 0, ""
        if self._on_cpu and cpu.available():
            self.crossover = crossover(self.mask, self.values, self.starts, self.in_features)
        elif cuda := cuda_kernels(self.values):
            self.starts = cuda.gpu.block_starts(self.mask)
            shape = (self.out_features, self.in_features)
            self.plan = cuda.plan(cuda.gpu.Packed("bitmask", self.values, self.mask, self.starts, shape))
        self._prepared = True

    def kernel(self, tokens: int) -> str:
        if not self._prepared:
            self.prepare()
        if not (self._on_cpu and cpu.available()):
            return _kernel_on_cuda(self, tokens)
        path = cpu.path(self.values.dtype)
        if tokens <= self.crossover:
            return f"bitmask {path}"
        many = cpu.has_many(self.values.dtype, path)
        return f"bitmask {path}, many tokens" if many else "expanded tiles and dense GEMM"

    def dense_weight(self) -> Tensor:
        return bitmask.unpack(self.mask, self.values, self.in_features)

    def extra_repr(self) -> str:
        density = (self.values.numel() - PADDING) / (self.in_features * self.out_features)
        return f"{super().extra_repr()}, density={density:.3f}"


class Sparse24Linear(SparseLinear):
    """A `SparseLinear` in the sparse24 layout: 2:4."""

    LAYOUT = "sparse24"
    PACKED = ("values", "positions")
    values: Tensor
    positions: Tensor
    cusparselt: Tensor
    cutlass: Tensor

    def __init__(self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__(shape, bias, dtype, device)
        rows, columns = shape
        if columns % 4:
            raise ModelError(f"shape {list(shape)}: the sparse24 layout needs columns that are a multiple of 4")
        self.register_buffer("values", torch.empty(rows, columns // 2, dtype=dtype, device=device))
        self.register_buffer("positions", torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=device))
        for name in ("cusparselt", "cutlass"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> Self:
        values, positions = sparse24.pack(weight)
        layer = cls(weight.shape, bias is not None, weight.dtype, "meta")
        layer.values, layer.positions = values, positions
        layer._take_bias(bias)
        layer.prepare()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if not self._prepared:
            self.prepare()
        return _sparse24_linear(x, self.values, self.positions, self.bias, self.cusparselt, self.cutlass, self.plan)

    def check(self) -> None:
        sparse24.check(self.values, self.positions, (self.out_features, self.in_features))
        super().check()

    def prepare(self) -> None:
        """Check the weight; find which kernel is the fastest for how many tokens, and what torch's need beside it."""
        self.check()
        self.plan, self.cusparselt, self.cutlass = "", self.values.new_empty(0), self.values.new_empty(0)
        if cuda := cuda_kernels(self.values):
            shape = (self.out_features, self.in_features)
            weight = cuda.gpu.Packed("sparse24", self.values, self.positions, self.values, shape)
            self.plan = cuda.plan(weight)
            needed = {choice.kernel for choice in cuda.choices(self.plan)}
            self.cusparselt, self.cutlass = cuda.operands(weight, needed)
        self._prepared = True

    def kernel(self, tokens: int) -> str:
        if not self._prepared:
            self.prepare()
        return _kernel_on_cuda(self, tokens)

    def dense_weight(self) -> Tensor:
        return sparse24.unpack(self.values, self.positions)


LAYOUTS: dict[str, type[SparseLinear]] = {"bitmask": BitmaskLinear, "sparse24": Sparse24Linear}


def cuda_kernels(values: Tensor) -> Any:
    """The module `cuda_linear` where it has kernels for these values: in 16 bit on CUDA, with Triton; else None."""
    there = values.is_cuda and values.element_size() == 2 and find_spec("triton")
    return import_module("gblm_compress.layouts.cuda_linear") if there else None


def _kernel_on_cuda(layer: SparseLinear, tokens: int) -> str:
    if not layer.plan:
        return UNPACKED
    from gblm_compress.layouts import cuda_linear

    kernel = cuda_linear.choose(layer.plan, tokens).kernel
    words = {"triton": f"{layer.LAYOUT} Triton", "cusparselt": "cuSPARSELt", "cutlass": "CUTLASS", "dense": UNPACKED}
    return words[kernel]


def _planned(x: Tensor, bias: Tensor | None, plan: str, packed: tuple[Any, ...], *operands: Tensor) -> Tensor:
    """x Wᵀ + b as the plan says; `packed` are the fields of `Packed`, `operands` those of `Operands`."""
    from gblm_compress.kernels.gpu import Packed
    from gblm_compress.layouts import cuda_linear

    weight = Packed(*packed)
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], rows)
    choice = cuda_linear.choose(plan, len(flat))
    given = cuda_linear.Operands(*operands) if operands else None
    return cuda_linear.run(choice, flat, weight, bias, given).reshape(*x.shape[:-1], rows)


def _bitmask_linear_cpu(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    columns: int,
    crossover: int,
    plan: str,
) -> Tensor:
    flat = x.reshape(-1, columns)
    tokens = flat.shape[0]
    if not cpu.available():
        y = flat @ bitmask.unpack(mask, values, columns).T
    elif 0 < tokens <= crossover:
        y = cpu.linear(flat, mask, values, starts)
    else:
        y = linear_many(flat, mask, values, starts)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], mask.shape[0])


def _bitmask_linear_cuda(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    columns: int,
    crossover: int,
    plan: str,
) -> Tensor:
    if not plan:
        return nn.functional.linear(x, bitmask.unpack(mask, values, columns), bias)
    return _planned(x, bias, plan, ("bitmask", values, mask, starts, (mask.shape[0], columns)))


def _bitmask_linear_shape(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    columns: int,
    crossover: int,
    plan: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


_OPS.impl("bitmask_linear", _bitmask_linear_cpu, "CPU")
_OPS.impl("bitmask_linear", _bitmask_linear_cuda, "CUDA")
torch.library.register_fake("gblm_compress::bitmask_linear", _bitmask_linear_shape, lib=_OPS)
_bitmask_linear = torch.ops.gblm_compress.bitmask_linear.default


def _sparse24_linear_cpu(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, cusparselt: Tensor, cutlass: Tensor, plan: str
) -> Tensor:
    return nn.functional.linear(x, sparse24.unpack(values, positions), bias)


def _sparse24_linear_cuda(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, cusparselt: Tensor, cutlass: Tensor, plan: str
) -> Tensor:
    if not plan:
        return nn.functional.linear(x, sparse24.unpack(values, positions), bias)
    shape = (values.shape[0], 2 * values.shape[1])
    return _planned(x, bias, plan, ("sparse24", values, positions, values, shape), cusparselt, cutlass)


def _sparse24_linear_shape(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, cusparselt: Tensor, cutlass: Tensor, plan: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_OPS.impl("sparse24_linear", _sparse24_linear_cpu, "CPU")
_OPS.impl("sparse24_linear", _sparse24_linear_cuda, "CUDA")
torch.library.register_fake("gblm_compress::sparse24_linear", _sparse24_linear_shape, lib=_OPS)
_sparse24_linear = torch.ops.gblm_compress.sparse24_linear.default


def linear_many(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """x Wᵀ for many tokens: on the kernel for them where this CPU has one for the dtype, else by tiles."""
    if cpu.has_many(values.dtype, cpu.path(values.dtype)):
        return cpu.linear(x, mask, values, starts, many=True)
    return linear_by_tiles(x, mask, values, starts)


def linear_by_tiles(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """x Wᵀ for any number of tokens: tiles of rows expanded into one buffer, each multiplied densely.

    Args:
        x: [tokens, columns] in the dtype of `values`.
        mask, values, starts: the packed weight [rows, columns].

    Returns:
        [tokens, rows] in the dtype of `x`.
    """
    rows, columns = mask.shape[0], x.shape[1]
    size = min(rows, max(16, TILE_BYTES // (columns * values.element_size())))
    tile = cpu.scratch(size * columns * values.element_size()).view(values.dtype).view(size, columns)
    parts = []
    for first in range(0, rows, size):
        part = cpu.expand(mask, values, starts, columns, first, tile[: min(size, rows - first)])
        parts.append(x @ part.T)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def crossover(mask: Tensor, values: Tensor, starts: Tensor, columns: int) -> int:
    """The largest number of tokens, up to 8, for which the sparse kernel beats expanding tiles for this shape."""
    shape = f"{mask.shape[0]}x{columns} {values.dtype} {torch.get_num_threads()} {cpu.path(values.dtype)}"
    return remembered(
        _machine(),
        f"crossover {shape}",
        lambda: _measure_crossover(mask, values, starts, columns),
        lambda tokens: type(tokens) is int and 1 <= tokens <= cpu.FEW_TOKENS,
    )


@cache
def _machine() -> str:
    from gblm_compress.machine.environment import cpu_name

    return f"{cpu_name()}, torch {torch.__version__}"


def _measure_crossover(mask: Tensor, values: Tensor, starts: Tensor, columns: int) -> int:
    for tokens in range(cpu.FEW_TOKENS, 1, -1):
        x = torch.ones(tokens, columns, dtype=values.dtype)
        if _best_time(cpu.linear, x, mask, values, starts) <= _best_time(linear_many, x, mask, values, starts):
            return tokens
    return 1


def _best_time(function: Any, *arguments: Any) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times[1:])
