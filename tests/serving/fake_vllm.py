"""As much of vLLM as `vllm_layers` imports, with loaders that share rows and columns out as vLLM's do."""

import logging
import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

METHODS: dict[str, type] = {}
LAYERS = "vllm.model_executor.layers"


class Config:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearBase(nn.Module):
    """A layer that is told its rank, and asks its quantisation for a method and for weights.

    Args:
        parts: (name, rows in the folder, ranks that share one piece) of each part.
        columns: inputs; shared out over the ranks if `row_parallel`.
    """

    def __init__(
        self, config, prefix, parts, columns, rank=0, ranks=1, row_parallel=False, dtype=torch.float32
    ) -> None:
        super().__init__()
        self.rank, self.ranks, self.row_parallel = rank, ranks, row_parallel
        self.pieces = {name: (1 if row_parallel else ranks // shared, shared) for name, _, shared in parts}
        self.sizes = {name: rows // self.pieces[name][0] for name, rows, _ in parts}
        self.method = config.get_quant_method(self, prefix)
        self.method.create_weights(
            layer=self,
            input_size_per_partition=columns // ranks if row_parallel else columns,
            output_partition_sizes=list(self.sizes.values()),
            input_size=columns,
            output_size=sum(rows for _, rows, _ in parts),
            params_dtype=dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        data = parameter.data
        if self.row_parallel:
            if (dimension := getattr(parameter, "input_dim", None)) is not None:
                size = data.shape[dimension]
                tensor = tensor.narrow(dimension, self.rank * size, size)
        elif (dimension := getattr(parameter, "output_dim", None)) is not None:
            size, names = self.sizes[shard], list(self.sizes)
            data = data.narrow(dimension, sum(self.sizes[name] for name in names[: names.index(shard)]), size)
            tensor = tensor.narrow(dimension, self.rank // self.pieces[shard][1] * size, size)
        assert data.shape == tensor.shape
        data.copy_(tensor)

    def load(self, shard: Any, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            parameter = self.get_parameter(name)
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, tensor, *arguments)  # type: ignore[attr-defined]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(self, x, bias)


class UnquantizedLinearMethod:
    def create_weights(self, **_: Any) -> None:
        """Weights of a dense layer are of no interest here."""


class Logger(logging.Logger):
    def info_once(self, message: str) -> None:
        self.info(message)


def set_weight_attrs(parameter: nn.Parameter, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(parameter, name, value)


def install(monkeypatch: Any) -> None:
    """Put these modules where vLLM's would be."""
    contents: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("vllm", "vllm.model_executor", LAYERS)},
        "vllm.logger": {"init_logger": Logger},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        f"{LAYERS}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{LAYERS}.quantization": {"register_quantization_config": lambda name: partial(METHODS.setdefault, name)},
        f"{LAYERS}.quantization.base_config": {"QuantizationConfig": Config, "QuantizeMethodBase": object},
    }
    METHODS.clear()
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
