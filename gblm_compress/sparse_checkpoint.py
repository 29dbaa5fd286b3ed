"""Sparse checkpoints: folders that `AutoModelForCausalLM.from_pretrained` loads as sparse models.

The weights are plain tensors in safetensors, `config.json` has a `quantization_config` with method `gblm_sparse`, and
transformers' own quantizer registry, which importing `gblm_compress` fills, puts `SparseLinear` modules in place of
the linear layers before the tensors are loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gblm_compress.architecture import weight_matrix
from gblm_compress.artifact import read_json
from gblm_compress.errors import ModelError
from gblm_compress.model_files import INDEX, SPARSE_INDEX, SPARSE_METHOD, SPARSE_SINGLE
from gblm_compress.sparse_linear import LAYOUTS, SparseLinear


@register_quantization_config(SPARSE_METHOD)
class SparseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of a sparse checkpoint.

    Attributes:
        layout: one of `LAYOUTS`.
        layers: {layer: `SparseLinear.description()`}.
    """

    def __init__(self, layers: dict[str, dict[str, Any]] | None = None, layout: str = "", **unknown: Any) -> None:
        self.quant_method = SPARSE_METHOD
        self.layout = layout
        self.layers = layers or {}


@register_quantizer(SPARSE_METHOD)
class SparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the listed layers by empty `SparseLinear`s, for transformers to load their tensors into."""

    requires_calibration = True  # transformers must not try to make such weights from dense ones
    quantization_config: SparseConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layout = self.quantization_config.layout
        if layout not in LAYOUTS:
            raise ModelError(f"layout {layout!r} is not known; this version reads {' and '.join(LAYOUTS)}")
        dtype = model.config.dtype or torch.float32
        for name, description in self.quantization_config.layers.items():
            model.set_submodule(name, LAYOUTS[layout](**description, dtype=dtype, device="meta"))
            # transformers would initialize what is not loaded, and GPT-2's rule reaches into children for `.weight`
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True

    # transformers gives the config to one of these two, depending on its version, before it looks for the weights.
    def update_attn_implementation(self, config: Any) -> Any:
        return _with_weights_named(config)

    def update_tp_plan(self, config: Any) -> Any:
        return _with_weights_named(config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.quantization_config.layers:
            model.get_submodule(name).prepare()  # type: ignore[operator]
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _with_weights_named(config: Any) -> Any:
    """Say where the weights of a packed folder are, unless `save_pretrained` has given them the ordinary name again."""
    folder = Path(config._name_or_path)
    if not folder.is_dir() or (folder / SPARSE_SINGLE).exists():
        config.transformers_weights = SPARSE_SINGLE
    elif (folder / SPARSE_INDEX).exists():
        config.transformers_weights = SPARSE_INDEX
    return config


def save_packed(model: Any, folder: Path) -> None:
    """`save_pretrained`, with weights called so that transformers without this package finds none.

    It would ignore the packed tensors otherwise, and fill the layers with random numbers.
    """
    model.save_pretrained(folder)
    for path in sorted(folder.glob("model*.safetensors")):
        path.rename(folder / _packed_name(path.name))
    index = folder / INDEX
    if index.exists():
        content = read_json(index)
        content["weight_map"] = {name: _packed_name(file) for name, file in content["weight_map"].items()}
        (folder / SPARSE_INDEX).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        index.unlink()


def _packed_name(file: str) -> str:
    return SPARSE_SINGLE.removesuffix(".safetensors") + file.removeprefix("model")


def sparsify_(model: Any, names: list[str], layout: str = "bitmask") -> None:
    """Replace the named linear layers of a model by `SparseLinear`s with the same values, in place.

    Raises:
        UsageError: the layout cannot hold a weight.
    """
    layers = {}
    for name in names:
        dense = model.get_submodule(name)
        sparse: SparseLinear = LAYOUTS[layout].from_dense(weight_matrix(dense).detach(), dense.bias)
        model.set_submodule(name, sparse)
        layers[name] = sparse.description()
    config = SparseConfig(layers, layout)
    model.config.quantization_config = config
    model.hf_quantizer = SparseQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = SPARSE_METHOD
