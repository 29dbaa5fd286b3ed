"""`PackedLinear`: a linear layer that holds packed weights only; `PackedEmbedding` looks up its rows.

The product is one operator of torch without other state: compilers and CUDA graphs see one call.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS, check_described, cpu_linear
from gblm_compress.layouts.packed import check_tensor, share_moved

UNPACKED = "dense product of the unpacked weight"
DERIVED = ("starts", "sums", "cusparselt", "like")
"""Buffers that `prepare` fills and nothing saves: where values begin, sums of levels by row, the copy for cuSPARSELt,
and an empty tensor in the dtype of inputs and outputs. They are empty if the kernels do not read them.
"""
_LIBRARY: Any = torch.library.Library("gblm_compress", "DEF")  # type: ignore[no-untyped-call]


def _held(layout: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip((*LAYOUTS[layout].kind.names, *DERIVED), tensors, strict=True))


def on_cpu(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, layout: str, shape: list[int], crossover: int, plan: str
) -> Tensor:
    """The operator on a CPU, and without a plan on any device: x [..., columns] in the dtype of the layer.

    Args:
        tensors: the buffers of the layout, then `DERIVED`.
        crossover: the most tokens for which the CPU's kernel is the fastest; 0 without a kernel.
        plan: of `cuda_linear`; empty without one.
    """
    kind, held = LAYOUTS[layout].kind, _held(layout, tensors)
    dtype = held["like"].dtype if kind.width else held["values"].dtype
    if crossover and (weight := kind.for_cpu(held, shape, dtype)) is not None:
        return cpu_linear.linear(x, weight, bias, crossover)
    return nn.functional.linear(x, kind.unpack(held, shape[1], dtype), bias)


def on_cuda(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, layout: str, shape: list[int], crossover: int, plan: str
) -> Tensor:
    if not plan:
        return on_cpu(x, tensors, bias, layout, shape, 0, plan)
    from gblm_compress.layouts import cuda_linear

    held = _held(layout, tensors)
    weight = LAYOUTS[layout].kind.for_gpu(held, layout, shape, x.dtype)
    return cuda_linear.linear(x, weight, bias, plan, held["cusparselt"])


def _shape(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, layout: str, shape: list[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


_LIBRARY.define(
    "linear(Tensor x, Tensor[] tensors, Tensor? bias, str layout, int[] shape, int crossover, str plan) -> Tensor"
)
_LIBRARY.impl("linear", on_cpu, "CPU")
_LIBRARY.impl("linear", on_cuda, "CUDA")
torch.library.register_fake("gblm_compress::linear", _shape, lib=_LIBRARY)
OPERATOR = torch.ops.gblm_compress.linear.default


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W [out_features, in_features] packed, for inference. ModelError for impossible sizes.

    The packed tensors are checked before the first use, and again after loading, moving or assignment, but not after
    writes in place.

    Args:
        sizes: the layout's own, see `Floats.sizes`.

    Attributes:
        transposed: whether the dense layer stores its weight as [in_features, out_features].
        loading: whether transformers is filling it: `weight` has no values yet.
    """

    values: Tensor

    def __init__(
        self, layout: str, shape: Sequence[int], bias: bool, dtype: torch.dtype, device: str | None = None, **sizes: Any
    ) -> None:
        super().__init__()
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise ModelError(f"shape {shape!r} does not fit a matrix: two whole numbers above 0 are needed")
        self.layout, self.kind = layout, LAYOUTS[layout].kind
        given = {**dict.fromkeys({"group"} & {*self.kind.sizes}), **sizes}
        if given.keys() != set(self.kind.sizes):
            raise TypeError(f"arguments {sorted(given)} for the {layout} layout, which takes {sorted(self.kind.sizes)}")
        self.out_features, self.in_features = shape
        self.group: int | None = sizes.get("group")
        values = torch.empty(shape[0], dtype=dtype, device=device) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)
        for name, tensor in self.kind.empty(shape, dtype, device, sizes).items():
            self.register_buffer(name, tensor)
        for name in DERIVED:
            self.register_buffer(name, torch.empty(0, dtype=dtype if name == "like" else None), persistent=False)
        self.crossover, self.plan = 0, ""
        self.transposed = self.loading = False
        self._prepared = False
        self._weight: cpu.Weight | None = None

    @classmethod
    def described(cls, layout: str, description: Any, dtype: torch.dtype) -> Self:
        """An empty layer of a `description`; ModelError for any other value."""
        layout = description.get("layout", layout) if isinstance(description, dict) else layout
        check_described(layout, {"": description})
        try:
            return cls(layout, dtype=dtype, device="meta", **{k: v for k, v in description.items() if k != "layout"})
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"it is described as {description!r}; {error}; a newer gblm-compress may have packed it"
            ) from error

    @classmethod
    def from_dense(cls, layout: str, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """The prepared layer of a weight [out_features, in_features]; UsageError if the layout cannot hold it.

        `options` go to the kind's `pack`.
        """
        kind: Any = LAYOUTS[layout].kind
        layer = cls.holding(layout, weight.shape, kind.pack(weight, **options), weight.dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.prepare()
        return layer

    @classmethod
    def holding(
        cls, layout: str, shape: Sequence[int], packed: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Self:
        """A layer without bias that holds packed tensors {buffer: tensor}, neither checked nor copied."""
        layer = cls(layout, shape, False, dtype, "meta", **LAYOUTS[layout].kind.sizes_of(packed, shape))
        for name, tensor in packed.items():
            setattr(layer, name, tensor)
        return layer

    @classmethod
    def stack(cls, layers: Sequence[Self]) -> Self:
        """One layer, without bias, with the outputs of several; UsageError if they have no common form."""
        first, heights = layers[0], [layer.out_features for layer in layers]
        packed = first.kind.stack([layer.held for layer in layers], heights, first.in_features)
        return cls.holding(first.layout, (sum(heights), first.in_features), packed, first.dtype)

    def cut(self, rows: range, columns: range) -> Self:
        """A part of a checked layer, without bias; UsageError if the layout cannot be cut there."""
        packed = self.kind.cut(self.held, self.shape, rows, columns)
        return self.holding(self.layout, (len(rows), len(columns)), packed, self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def held(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self.kind.names}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weight, bias, inputs and outputs."""
        return self.get_buffer("like" if self.kind.width else "values").dtype

    def description(self) -> dict[str, Any]:
        """The arguments of an empty layer of this size, without dtype and device, for JSON."""
        sizes = self.kind.sizes_of(self.held, self.shape)
        return {"shape": list(self.shape), "bias": self.bias is not None, **sizes}

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self._prepared:
            self.prepare()
        # The registered operator is for tracing; called through it, Python's share of a decode step doubles.
        eager = not torch.compiler.is_compiling() and type(x) is Tensor and not x.requires_grad
        if eager and self._weight is not None and x.is_cpu:
            return cpu_linear.linear(x, self._weight, bias, self.crossover)
        tensors = [getattr(self, name) for name in (*self.kind.names, *DERIVED)]
        shape = [self.out_features, self.in_features]
        return OPERATOR(x, tensors, bias, self.layout, shape, self.crossover, self.plan)

    def kernel(self, tokens: int) -> str:
        """The name of the kernel that `forward` runs for that many tokens."""
        if not self._prepared:
            self.prepare()
        if self._weight is not None:
            return cpu_linear.kernel(self._weight, self.layout, tokens, self.crossover)
        if not self.plan:
            return UNPACKED
        from gblm_compress.layouts import cuda_linear

        kernel = cuda_linear.choose(self.plan, tokens).kernel
        words = {"triton": f"{self.layout} Triton", "cusparselt": "cuSPARSELt", "dense": UNPACKED}
        return words[kernel]

    def look_up(self, numbers: Tensor) -> Tensor:
        """Rows of W [..., in_features] for numbers [...]; UsageError for a layout with a mask."""
        if self.kind.mask.name is not None:
            raise UsageError(f"rows cannot be looked up in the {self.layout} layout")
        if not self._prepared:
            self.prepare()
        rows = {name: tensor[numbers.flatten()] for name, tensor in self.held.items()}
        return self.kind.unpack(rows, self.in_features, self.dtype).reshape(*numbers.shape, self.in_features)

    def dense_weight(self) -> Tensor:
        return self.kind.unpack(self.held, self.in_features, self.dtype)

    def restores(self, weight: Tensor, stored: Tensor | None = None) -> bool:
        """Whether it holds that matrix, within the layout's tolerance; `stored` is the `dense_weight` of this layer."""
        if (weight.shape, weight.dtype) != (self.shape, self.dtype):
            return False
        return self.kind.restores(self.held, self.dense_weight() if stored is None else stored, weight)

    def error(self, weight: Tensor) -> float:
        """The share of that matrix that rounding moved: Σ |W - weight| / Σ |weight|."""
        return share_moved(self.dense_weight(), weight)

    @property
    def largest_error(self) -> float:
        return self.kind.largest_error

    def check(self) -> None:
        """ModelError, beginning with a buffer's name, if the tensors do not form such a weight."""
        self.kind.check(self.held, self.shape, self.group)
        if self.bias is not None:
            check_tensor("bias", self.bias, (self.dtype,), (self.out_features,))

    def prepare(self) -> None:
        """`check` the packed weight, and choose the kernels of the device."""
        self.check()
        held, device, place = self.held, self.get_buffer("values").device, self.kind.mask.name
        if place:
            # A copy: loaded tensors are parts of a mapped file, and later writes to it must not reach a kernel.
            held[place] = self._buffers[place] = held[place].clone()
        self.crossover, self.plan, self._weight = 0, "", None
        derived = {name: torch.empty(0, device=device) for name in DERIVED}
        if device.type == "cpu" and cpu.available():
            self._weight = self.kind.for_cpu(held, self.shape, self.dtype)
        if self._weight is not None:
            derived |= {name: made for name in DERIVED if (made := getattr(self._weight, name, None)) is not None}
            self.crossover = cpu_linear.crossover(self.layout, self._weight)
        elif cuda := self.cuda_kernels():
            weight = self.for_gpu()
            self.plan = cuda.plan(weight)
            kernels = {candidate.kernel for candidate in cuda.candidates(self.plan)}
            derived |= {"starts": self.get_buffer("starts"), "cusparselt": cuda.for_cusparselt(weight, kernels)}
        for name, tensor in {**derived, "like": self.get_buffer("like").to(device)}.items():
            self._buffers[name] = tensor
        self._prepared = True

    def for_gpu(self) -> Any:
        from gblm_compress.kernels import gpu

        if self.kind.mask.stored == "mask":
            self._buffers["starts"] = gpu.block_starts(self.get_buffer("mask"), whole_bytes=self.kind.width == 4)
        held = {**self.held, "starts": self.get_buffer("starts")}
        return self.kind.for_gpu(held, self.layout, self.shape, self.dtype)

    def cuda_kernels(self) -> Any:
        """The module `cuda_linear` if it has kernels for the weight (16 bit on CUDA, with Triton), else None."""
        there = self.get_buffer("values").is_cuda and self.dtype.itemsize == 2 and find_spec("triton")
        return import_module("gblm_compress.layouts.cuda_linear") if there else None

    @property
    def weight(self) -> Tensor:
        """A new copy of W as the dense layer stores it; writes into it are lost.

        While the layer is being loaded the copy has no values, and transformers treats it as initialized.
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
        return sum(tensor.nbytes for tensor in self.held.values())

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        prepared, before = self._prepared, dict(self._buffers)
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        if any(self._buffers[name] is not buffer for name, buffer in before.items()):
            self._prepared, self._weight = False, None
            if prepared and not self.get_buffer("values").is_meta:
                self.prepare()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" or name in self.__dict__.get("_buffers", ()):
            self._prepared = False
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._prepared = False
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.layout}, in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


OWN = "rows"  # the name of the layer in an embedding that owns one


class PackedEmbedding(nn.Module):
    """An embedding that looks up rows of a packed layer without a mask: its own, or the tied head."""

    rows: PackedLinear

    def __init__(self, layer: PackedLinear, own: bool) -> None:
        super().__init__()
        if own:
            self.rows = layer
        else:
            self.__dict__[OWN] = layer  # past torch, which would save it twice
        self.num_embeddings, self.embedding_dim = layer.shape

    def forward(self, numbers: Tensor) -> Tensor:
        return self.rows.look_up(numbers)

    @property
    def weight(self) -> Tensor:
        return self.rows.weight
