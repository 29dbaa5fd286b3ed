"""Packed layers in vLLM: the quantisation method that a packed folder's config.json names.

vLLM merges layers (q, k and v; gate and up) and shards them over processes. Its loaders get numbers in place of
weights, which reveals the rows and columns of a process.
"""

import re
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from gblm_compress.errors import ModelError, prefixed
from gblm_compress.layouts import LAYOUTS, check_described
from gblm_compress.layouts.packed import DTYPES
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.files import SPARSE_METHOD

DENSE = "weight"  # of an unpruned part beside pruned ones
logger = init_logger(f"vllm.{__name__}")  # vLLM shows loggers below its own name


@register_quantization_config(SPARSE_METHOD)
class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """The layout of a packed folder, and {layer: `PackedLinear.description()`}, from its `config.json`."""

    def __init__(self, layout: str, layers: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.layout, self.layers = layout, layers

    def get_name(self) -> str:
        return SPARSE_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the oldest that Triton supports

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        layout, layers = config.get("layout"), config.get("layers")
        check_described(layout, layers)
        if config.get("embeddings"):
            raise ModelError(
                "head and embedding of the folder are packed, which vLLM does not read; export with `--keep-head`"
            )
        assert isinstance(layout, str) and isinstance(layers, dict)
        return cls(layout, layers)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        described = self._described(prefix)
        if not isinstance(layer, LinearBase):
            experts = re.compile(rf"{re.escape(prefix)}\.\d+\.")  # vLLM has them in one tensor
            if inside := [name for name in self.layers if experts.match(name)]:
                raise ModelError(f"{inside[0]!r} is packed; vLLM has it in a {type(layer).__name__}, which stays dense")
            return None
        if not described:
            return UnquantizedLinearMethod()
        layouts = {description.get("layout", self.layout) for description in described}
        if len(layouts) > 1:
            raise ModelError(f"{prefix}: its parts are packed as {' and '.join(sorted(layouts))}; vLLM merges them")
        return PackedLinearMethod(layouts.pop(), prefix, described)

    def _described(self, prefix: str) -> list[dict[str, Any]]:
        parent, dot, own = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(own, [own])]
        return [self.layers[name] for name in names if name in self.layers]


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Fills and runs a layer of vLLM that is packed, at least in part.

    A part is one layer of the folder. Once its tensors are there, this process cuts out its share, still packed.
    No mapped file is held, and one layer at a time is dense.
    """

    def __init__(self, layout: str, prefix: str, described: list[dict[str, Any]]) -> None:
        self.layout, self.kind, self.prefix, self.described = layout, LAYOUTS[layout].kind, prefix, described

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        self.rows, self.columns, self.inputs = sum(output_partition_sizes), range(input_size), input_size
        self.dtype, self._place = params_dtype, partial(_places, weight_loader, "output_dim", self.rows)
        self._read: dict[Hashable, dict[str, Tensor]] = {}
        self._shares: dict[int, PackedLinear] | None = {}
        with prefixed(f"{self.prefix}: "):
            empty = PackedLinear.described(self.layout, self.described[0], params_dtype)
            if input_size_per_partition != input_size:
                found = _places(weight_loader, "input_dim", input_size_per_partition, input_size, None)
                self.columns = range(int(found[0]), int(found[-1]) + 1)
        self._packing: dict[str, Any] = {} if empty.group is None else {"group": empty.group}
        for name, dtype in {**{name: held.dtype for name, held in empty.held.items()}, DENSE: params_dtype}.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self._take, name)})
            layer.register_parameter(name, parameter)

    def _take(self, name: str, parameter: nn.Parameter, tensor: Tensor, shard: Hashable = None) -> None:
        if self._shares is None:
            raise ModelError(f"{self.prefix}: packed weights cannot be loaded a second time; restart vLLM")
        read = self._read.setdefault(shard, {})
        read[name] = tensor
        if DENSE in read or all(name in read for name in self.kind.names):
            with prefixed(f"{self.prefix}: "):
                part = self._part(self._read.pop(shard))
                for first, rows in _runs(self._place(part.out_features, shard)):
                    self._shares[first] = part.cut(rows, self.columns)

    def _part(self, read: dict[str, Tensor]) -> PackedLinear:
        if DENSE in read:
            part = PackedLinear.from_dense(self.layout, read[DENSE], **self._packing)
            if (error := part.error(read[DENSE])) > part.largest_error:
                raise ModelError(
                    f"a layer beside packed ones was left dense, and the {self.layout} layout would change it by "
                    f"{100 * error:.0f} %; export to bitmask, or prune all layers that the engine merges"
                )
        else:
            rows = (*read[self.kind.names[0]].shape, 0)[0]
            part = PackedLinear.holding(self.layout, (rows, self.inputs), read)
            part.check()
        if part.in_features != self.inputs:
            raise ModelError(f"{DENSE}: {part.in_features} columns; the model's has {self.inputs}")
        return part

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self._shares is None:
            return
        device = layer.get_parameter(DENSE).device
        for name in (*self.kind.names, DENSE):
            delattr(layer, name)
        with prefixed(f"{self.prefix}: "):
            if sum(share.out_features for share in self._shares.values()) != self.rows:
                raise ModelError("a tensor of it is not in the folder, so it is incomplete")
            shares = [self._shares.pop(first) for first in sorted(self._shares)]
            packed = shares[0] if len(shares) == 1 else PackedLinear.stack(shares)
            packed = packed.to(device=device, dtype=self.dtype)
            packed.prepare()
        self._shares = None
        layer.add_module("packed", packed)
        logger.info_once(f"gblm-compress: {packed.layout} weights on {device.type}, one token: {packed.kernel(1)}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed: Any = layer.get_submodule("packed")
        return packed.product(x, bias)


def _runs(places: Tensor) -> Iterator[tuple[int, range]]:
    """Rows of a part without gaps: (first row in vLLM's layer, rows of the part)."""
    shifts = groupby(enumerate(places.tolist()), lambda pair: pair[0] - pair[1] if pair[1] >= 0 else None)
    for shift, pairs in shifts:
        if shift is not None:
            rows = [row for row, _ in pairs]
            yield rows[0], range(rows[0] - shift, rows[-1] + 1 - shift)


def _places(load: Callable[..., None], dimension: str, size: int, of: int, shard: Hashable) -> Tensor:
    """The number of each of `size` rows (or columns) of vLLM's layer among the `of` of a part; -1 for other parts.

    `load` is vLLM's loader; `dimension` and `shard` are its names of the dimension and the part.
    """
    places = nn.Parameter(torch.full((size,), -1, device="cpu"), requires_grad=False)
    set_weight_attrs(places, {dimension: 0})
    numbers = torch.arange(of, device="cpu")
    try:
        load(places, numbers) if shard is None else load(places, numbers, shard)
    except (AssertionError, RuntimeError) as error:
        what = "rows" if dimension == "output_dim" else "columns"
        raise ModelError(f"vLLM cannot slice {of} {what} of the folder into {size} of its layer") from error
    return places.data
