"""`PackedLinear`: a linear layer that holds packed weights only. A layout is a subclass with an operator of its own.

An operator is registered with torch, so that compilers and CUDA graphs see one call. It depends on nothing but its
arguments, which are the same for every layout.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.layouts.packed import check_tensor, same_bits

UNPACKED = "dense product of the unpacked weight"
_LIBRARY: Any = torch.library.Library("gblm_compress", "DEF")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor x, Tensor[] tensors, Tensor? bias, int rows, int columns, int crossover, str plan"
Product = Callable[..., Tensor]


def operator(name: str, cpu: Product, cuda: Product) -> Product:
    """Register x Wᵀ + b of a layout as `torch.ops.gblm_compress.NAME`, and return it.

    Args:
        cpu, cuda: the product on each device. Both take, by position,

            - x: [..., columns] in the dtype of the weight
            - tensors: the buffers `PACKED`, then `DERIVED` of the layer
            - bias: [rows], or None
            - rows, columns: the shape of W
            - crossover: up to how many tokens a CPU's kernel for few is the faster one
            - plan: what `cuda_linear` chose; empty for none

            and return [..., rows].
    """
    _LIBRARY.define(f"{name}({_ARGUMENTS}) -> Tensor")
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"gblm_compress::{name}", _shape, lib=_LIBRARY)
    registered: Product = getattr(torch.ops.gblm_compress, name).default
    return registered


def _shape(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, rows: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


MOVES_MUCH = {8: 0.03, 4: 0.25}
"""{bits of a level: the share of a weight beyond which rounding has moved much of it}."""


def share_moved(stored: Tensor, weight: Tensor) -> float:
    """What share of a weight rounding moved: Σ |stored - weight| / Σ |weight|."""
    moved = (stored.float() - weight.float()).abs().sum()
    return float(moved / weight.float().abs().sum().clamp(min=1e-30))


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W [out_features, in_features] packed. Inference only.

    The packed tensors are checked before the first use and whenever others take their place: by loading, by
    `load_state_dict`, by moving the layer, by assignment. What is written into them in place is not noticed.

    Args:
        shape: (out_features, in_features).
        bias: whether there is one.
        dtype: of weight and bias.

    Attributes:
        LAYOUT: the name in `LAYOUTS`.
        PACKED: the buffers that hold the weight, on disk too.
        DERIVED: the buffers that `find_kernels` fills.
        OPERATOR: the product, made by `operator`.
        TOLERANCE: largest difference of a restored weight, as a fraction of the largest weight of the matrix; 0 where
            all are restored bit for bit.
        LARGEST_ERROR: a layer with a larger `error` is for the layout that `Layout.exact` names.
        transposed: whether the layer stands for one that stores its weight as [in_features, out_features].
        loading: whether transformers is filling it: `weight` has no values yet.

    Raises:
        ModelError: there is no such layer.
    """

    LAYOUT: ClassVar[str]
    PACKED: ClassVar[tuple[str, ...]]
    DERIVED: ClassVar[tuple[str, ...]] = ()
    OPERATOR: ClassVar[Product]
    TOLERANCE: ClassVar[float] = 0.0
    LARGEST_ERROR: ClassVar[float] = float("inf")

    def __init__(self, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__()
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise ModelError(f"shape {shape!r} is not one of a matrix: two whole numbers above 0 are needed")
        self.out_features, self.in_features = shape
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        for name in self.DERIVED:
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.crossover, self.plan = 0, ""
        self.transposed = self.loading = False
        self._prepared = False

    @staticmethod
    def bits(width: int) -> tuple[int, int]:
        """Bits of every weight, and bits more of every nonzero, where a dense weight has `width`."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """The packed layer of a dense one: an empty layer, `filled`.

        Args:
            weight: [out_features, in_features].
            bias: [out_features].

        Raises:
            UsageError: the layout cannot hold the weight.
        """
        raise NotImplementedError

    @classmethod
    def holding(cls, shape: Sequence[int], *packed: Tensor, **sizes: Any) -> Self:
        """A layer without bias around packed tensors, which are neither checked nor copied.

        Args:
            packed: in the order of `PACKED`.
            sizes: what `__init__` takes beside.
        """
        layer = cls(shape, False, torch.float32, "meta", **sizes)
        for name, tensor in zip(cls.PACKED, packed, strict=True):
            setattr(layer, name, tensor)
        return layer

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        """One layer for checked ones without bias and of as many inputs: their outputs one after the other.

        Raises:
            UsageError: the layout cannot be stacked.
        """
        raise UsageError(f"the {cls.LAYOUT} layout cannot be stacked")

    def cut(self, rows: range, columns: range) -> Self:
        """The layer, without bias, of some outputs and inputs, each without gaps; this one must be checked.

        Raises:
            UsageError: the layout cannot be cut there.
        """
        raise UsageError(f"the {self.LAYOUT} layout cannot be cut")

    def filled(self, bias: Tensor | None, **packed: Tensor) -> Self:
        """This layer with the packed tensors, prepared."""
        for name, tensor in packed.items():
            setattr(self, name, tensor)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.prepare()
        return self

    def description(self) -> dict[str, Any]:
        """The arguments, beside dtype and device, that make an empty layer of this size; plain values for JSON."""
        return {"shape": [self.out_features, self.in_features], "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b with a bias from elsewhere."""
        if not self._prepared:
            self.prepare()
        tensors = [getattr(self, name) for name in (*self.PACKED, *self.DERIVED)]
        return self.OPERATOR(x, tensors, bias, self.out_features, self.in_features, self.crossover, self.plan)

    def kernel(self, tokens: int) -> str:
        """The kernel that `forward` runs for that many tokens, in words."""
        if not self._prepared:
            self.prepare()
        if not self.plan:
            return UNPACKED
        from gblm_compress.layouts import cuda_linear

        kernel = cuda_linear.choose(self.plan, tokens).kernel
        words = {"triton": f"{self.LAYOUT} Triton", "cusparselt": "cuSPARSELt", "cutlass": "CUTLASS", "dense": UNPACKED}
        return words[kernel]

    def look_up(self, numbers: Tensor) -> Tensor:
        """Rows of W [..., in_features] for their numbers [...].

        Raises:
            UsageError: the layout cannot be read row by row.
        """
        raise UsageError(f"rows cannot be looked up in the {self.LAYOUT} layout")

    def dense_weight(self) -> Tensor:
        """W, bit for bit or within `TOLERANCE`."""
        raise NotImplementedError

    def restores(self, weight: Tensor) -> bool:
        """Whether W is that matrix: bit for bit, or within `TOLERANCE`."""
        restored = self.dense_weight()
        if not self.TOLERANCE:
            return same_bits(restored, weight)
        if (restored.shape, restored.dtype) != (weight.shape, weight.dtype):
            return False
        return bool((restored - weight).abs().max() <= self.TOLERANCE * weight.abs().max())

    def error(self, weight: Tensor) -> float:
        """What share of that matrix rounding moved: Σ |W - weight| / Σ |weight|."""
        return share_moved(self.dense_weight(), weight)

    def check(self) -> None:
        """Hold the packed tensors against layout and shape.

        Raises:
            ModelError: they are no such weight; the message begins with the tensor's name.
        """
        if self.bias is not None:
            check_tensor("bias", self.bias, (self.dtype,), (self.out_features,))

    def prepare(self) -> None:
        """Make ready to run: check the packed weight, and find what follows from it and from the machine.

        Loading and moving the layer do it; `forward` does where it was filled by hand.

        Raises:
            ModelError: as for `check`.
        """
        self.check()
        self.crossover, self.plan = 0, ""
        self.find_kernels()
        self._prepared = True

    def find_kernels(self) -> None:
        """Find which kernel is the fastest for how many tokens, and fill the buffers `DERIVED`."""

    def cuda_kernels(self) -> Any:
        """The module `cuda_linear` where it has kernels for the weight: in 16 bit on CUDA, with Triton; else None."""
        there = self.get_buffer(self.PACKED[0]).is_cuda and self.dtype.itemsize == 2 and find_spec("triton")
        return import_module("gblm_compress.layouts.cuda_linear") if there else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weight, bias, inputs and outputs."""
        return self.get_buffer("values").dtype

    @property
    def weight(self) -> Tensor:
        """W as the dense layer stores it, for models that read it: unpacked for the call, and theirs to keep.

        What is written into it is lost. While the layer is being loaded it has no values, and transformers, which would
        initialize it, takes it for done.
        """
        if self.loading:
            weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
