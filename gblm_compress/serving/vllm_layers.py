"""Packed layers in vLLM: its quantisation method of the name that stands in a packed folder's config.json.

vLLM merges layers (q, k and v; gate and up) and shards them over processes. Which rows and columns a process holds is
asked of vLLM's own loaders: they are handed numbers in the place of weights.
"""

import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from gblm_compress.errors import GblmError, ModelError
from gblm_compress.layouts import LAYOUTS, check_described
from gblm_compress.layouts.packed import DTYPES
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.files import SPARSE_METHOD
from gblm_compress.serving.parts import DENSE, Parts

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


@register_quantization_config(SPARSE_METHOD)
class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """What `config.json` says of a packed folder.

    Attributes:
        layout: one of `LAYOUTS`.
        layers: {layer of the folder: `PackedLinear.description()`}.
    """

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
            experts = re.compile(rf"{re.escape(prefix)}\.\d+\.")  # that vLLM has in one tensor
            if inside := [name for name in self.layers if experts.match(name)]:
                raise ModelError(f"{inside[0]!r} is packed; vLLM has it in a {type(layer).__name__}, which stays dense")
            return None
        if not described:
            return UnquantizedLinearMethod()
        layouts = {description.get("layout", self.layout) for description in described}
        if len(layouts) > 1:
            raise ModelError(f"{prefix}: its parts are packed as {' and '.join(sorted(layouts))}; vLLM has them in one")
        return PackedLinearMethod(layouts.pop(), prefix, described)

    def _described(self, prefix: str) -> list[dict[str, Any]]:
        """What is said of those layers of the folder that are in a layer of vLLM."""
        parent, dot, own = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(own, [own])]
        return [self.layers[name] for name in names if name in self.layers]


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """How vLLM fills and runs a layer that is packed, in part at least.

    Args:
        layout: one of `LAYOUTS`.
        prefix: vLLM's name of the layer.
        described: what config.json says of its parts that are packed.
    """

    def __init__(self, layout: str, prefix: str, described: list[dict[str, Any]]) -> None:
        self.kind, self.prefix, self.described = LAYOUTS[layout].layer, prefix, described

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        with self._named_errors():
            empty = _empty(self.kind, self.described[0], params_dtype)
            rows = sum(output_partition_sizes)
            columns = range(input_size)
            if input_size_per_partition != input_size:
                found = _places(weight_loader, "input_dim", input_size_per_partition, input_size, None)
                columns = range(int(found[0]), int(found[-1]) + 1)
        place = partial(_places, weight_loader, "output_dim", rows)
        self.parts: Parts | None = Parts(self.kind, rows, columns, input_size, place, self.described[0].get("group"))
        self.dtype = params_dtype
        dtypes = {**{name: empty.get_buffer(name).dtype for name in self.kind.PACKED}, DENSE: params_dtype}
        for name, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self._take, name)})
            layer.register_parameter(name, parameter)

    def _take(self, name: str, parameter: nn.Parameter, tensor: Tensor, shard: Hashable = None) -> None:
        if self.parts is None:
            raise ModelError(f"{self.prefix}: packed weights cannot be loaded a second time; start vLLM anew")
        with self._named_errors():
            self.parts.take(name, tensor, shard)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self.parts is None:
            return
        device = layer.get_parameter(DENSE).device
        for name in (*self.kind.PACKED, DENSE):
            delattr(layer, name)
        with self._named_errors():
            packed = self.parts.whole(device, self.dtype)
        self.parts = None
        layer.add_module("packed", packed)
        logger.info_once(f"gblm-compress: {packed.LAYOUT} weights on {device.type}, one token: {packed.kernel(1)}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed: Any = layer.get_submodule("packed")
        return packed.product(x, bias)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except GblmError as error:
            raise type(error)(f"{self.prefix}: {error}") from error


def _empty(kind: type[PackedLinear], description: Any, dtype: torch.dtype) -> PackedLinear:
    """A layer of that description without values."""
    try:
        sizes = {key: value for key, value in description.items() if key != "layout"}
        return kind(**{"dtype": dtype, "device": "meta", **sizes})
    except TypeError as error:
        raise ModelError(
            f"it is described as {description!r}; {error}; a newer gblm-compress may have packed it"
        ) from error


def _places(load: Callable[..., None], dimension: str, size: int, of: int, shard: Hashable) -> Tensor:
    """Which of `of` rows (or columns) of a part each of `size` rows of vLLM's layer is, -1 for those of other parts.

    Args:
        load: vLLM's loader of that layer.
        dimension: what vLLM calls the dimension: "output_dim" or "input_dim".
        shard: what vLLM calls the part.

    Raises:
        ModelError: vLLM cannot slice it so.
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
