"""Packed checkpoints: folders that `AutoModelForCausalLM.from_pretrained` loads as models with packed layers.

Importing `gblm_compress` registers a quantizer that replaces linear layers before transformers loads the tensors.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from gblm_compress.errors import ModelError, UsageError, prefixed
from gblm_compress.layouts import LAYOUTS, check_described
from gblm_compress.layouts.packed_linear import OWN, PackedEmbedding, PackedLinear
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models.architecture import head_and_embedding, is_linear, is_transposed, weight_matrix
from gblm_compress.models.experts import experts_of, unfuse_
from gblm_compress.models.files import INDEX, SINGLE, SPARSE_INDEX, SPARSE_METHOD, SPARSE_SINGLE
from gblm_compress.storage.records import read_json


@register_quantization_config(SPARSE_METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint.

    layers: {layer: `PackedLinear.description()`, and "layout" if it has another}. embeddings: {embedding: the layer
    whose rows it looks up}. experts: paths of mixtures with experts as layers, whose tensors have the model's names.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        layout: str = "",
        embeddings: dict[str, str] | None = None,
        experts: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = SPARSE_METHOD
        self.layout = layout
        self.layers = {} if layers is None else layers
        self.embeddings = {} if embeddings is None else embeddings
        self.experts = [] if experts is None else experts


@register_quantizer(SPARSE_METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the listed layers by empty `PackedLinear`s, for transformers to fill."""

    requires_calibration = True  # transformers must not try to make such weights from dense ones
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        settings = self.quantization_config
        layout, layers, embeddings = settings.layout, settings.layers, settings.embeddings
        with prefixed(f"{str(model.name_or_path)!r}: "):
            check_described(layout, layers)
            check_embeddings(embeddings, layers)
        unfuse_(model, settings.experts)
        own = {own_layer(name): name for name, layer in embeddings.items() if layer == own_layer(name)}
        for name, description in layers.items():
            with prefixed(f"{str(model.name_or_path)!r}: quantization_config, layer {name!r}: "):
                if name in own:
                    dense: Any = dense_embedding(model, own[name])
                else:
                    dense = linear_layer(model, name, tied=name in embeddings.values())
                empty = _like(dense, layout, description, model.config.dtype)
                model.set_submodule(own.get(name, name), PackedEmbedding(empty, own=True) if name in own else empty)
        with prefixed(f"{str(model.name_or_path)!r}: quantization_config, "):
            look_up_(model, embeddings)

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weights of a packed folder, unless `save_pretrained` has given them the ordinary name."""
        for name in (SPARSE_SINGLE, SPARSE_INDEX):
            if cached_file(config._name_or_path, name, _raise_exceptions_for_missing_entries=False) is not None:
                config.transformers_weights = name
                break
        return config

    # transformers calls one of the two, depending on its version, before it looks for the weights.
    update_tp_plan = update_attn_implementation

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        return [] if self.quantization_config.experts else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers marks loaded tensors, and initialises all others as for training
        optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        for name, tensor in model.state_dict(keep_vars=True).items():
            missing = not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False))
            if missing and not any(pattern.search(name) for pattern in optional):
                where = f"{str(model.name_or_path)!r}: {name}"
                raise ModelError(f"{where}: no such tensor is in the folder, so it is incomplete")
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            layer.loading = False
            with prefixed(f"{str(model.name_or_path)!r}: {name}."):
                layer.prepare()
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for packed tensors: their layer checks their shape, not transformers."""
        layer, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(layer)
        return isinstance(module, PackedLinear) and tensor in module.kind.names

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def save_packed(model: Any, folder: Path) -> None:
    """`save_pretrained` under names that transformers finds only with this package.

    It would ignore packed tensors otherwise, and fill the layers with random numbers.
    """
    model.save_pretrained(folder, save_original_format=not model.config.quantization_config.experts)
    ours, theirs = (name.removesuffix(".safetensors") for name in (SPARSE_SINGLE, SINGLE))
    for path in sorted(folder.glob(f"{theirs}*.safetensors")):
        path.rename(folder / path.name.replace(theirs, ours, 1))
    if (index := folder / INDEX).exists():
        content = read_json(index)
        content["weight_map"] = {name: file.replace(theirs, ours, 1) for name, file in content["weight_map"].items()}
        (folder / SPARSE_INDEX).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        index.unlink()


def pack_(
    model: Any,
    names: list[str],
    layout: str = "bitmask",
    tables: str | None = None,
    grids: Mapping[str, Grid] | None = None,
    **options: Any,
) -> tuple[list[str], dict[str, Tensor]]:
    """Replace the named linear layers by `PackedLinear`s with the same values, in place.

    `tables` is the layout for head and embedding, if any; `grids` are for quantised layouts. Returns the layers packed
    exactly, since the layout would round them too much, and {layer: dense weight} of head and embedding.
    """
    kind: Any = LAYOUTS[layout].kind
    layers, exact, other = {}, [], LAYOUTS[layout].exact
    for name in names:
        dense = linear_layer(model, name)
        weight, grid = weight_matrix(dense).detach(), (grids or {}).get(name)
        own = {"grid": grid} if grid is not None and kind.holds(grid) else {}
        try:
            packed = PackedLinear.from_dense(layout, weight, dense.bias, **options, **own)
            if other is not None and packed.error(weight) > packed.largest_error:
                packed = PackedLinear.from_dense(other, weight, dense.bias)
                exact.append(name)
        except ModelError as error:
            raise ModelError(f"{name}.{error}") from error
        except UsageError as error:
            pattern = LAYOUTS[layout].pattern
            first = f"; prune with `--pattern {pattern}` first" if pattern else ""
            raise UsageError(f"{name}: {error}{first}") from error
        packed.transposed = is_transposed(dense)
        model.set_submodule(name, packed)
        layers[name] = _described(packed, layout)
    dense_tables, embeddings = pack_tables_(model, tables) if tables else ({}, {})
    layers |= {name: _described(model.get_submodule(name), layout) for name in dense_tables}
    config = PackedConfig(layers, layout, embeddings, list(experts_of(model)))
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = SPARSE_METHOD
    return exact, dense_tables


def _described(packed: PackedLinear, layout: str) -> dict[str, Any]:
    return packed.description() | ({} if layout == packed.layout else {"layout": packed.layout})


def is_tied(model: nn.Module, name: str) -> bool:
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    return any(f"{name}.weight" in pair for pair in pairs)


def linear_layer(model: nn.Module, name: str, *, tied: bool = False) -> Any:
    """The layer of that name, which may share its weight if `tied`; `ModelError` if it cannot be packed."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no layer {name!r}") from error
    if not is_linear(module) or (not tied and is_tied(model, name)):
        kind = type(module).__name__
        raise ModelError(f"{name!r} is a {kind}; only Linear and Conv1D layers with weights of their own can be packed")
    return module


def _like(dense: Any, layout: str, description: Any, dtype: torch.dtype | None) -> PackedLinear:
    shape, bias = list(weight_matrix(dense).shape), getattr(dense, "bias", None) is not None
    if not isinstance(description, dict) or (description.get("shape"), description.get("bias")) != (shape, bias):
        raise ModelError(f"it is described as {description!r}; the model's has shape {shape} and bias {bias}")
    layer = PackedLinear.described(layout, description, dtype or torch.float32)
    layer.transposed, layer.loading = is_transposed(dense), True
    return layer


def own_layer(embedding: str) -> str:
    return f"{embedding}.{OWN}"


def pack_tables_(model: Any, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Replace head and embedding in place, if they are plain and the layout can hold them.

    Returns {packed layer: dense weight} and {embedding: the layer whose rows it looks up}.
    """
    head, embedding = head_and_embedding(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", head)
    plain = type(embedding) is nn.Embedding  # others scale the rows
    dense: dict[str, Tensor] = {}
    embeddings: dict[str, str] = {}
    if type(head) is nn.Linear and (plain or not tied) and (packed := _packed(head, layout)):
        dense[names[id(head)]] = head.weight.detach()
        model.set_submodule(names[id(head)], packed)
        if tied:
            embeddings[names[id(embedding)]] = names[id(head)]
    if type(embedding) is nn.Embedding and not tied and (packed := _packed(embedding, layout)):
        name = names[id(embedding)]
        dense[own_layer(name)], embeddings[name] = embedding.weight.detach(), own_layer(name)
        model.set_submodule(name, PackedEmbedding(packed, own=True))
    look_up_(model, embeddings)
    return dense, embeddings


def _packed(module: Any, layout: str) -> PackedLinear | None:
    weight = module.weight.detach()
    packed = PackedLinear.from_dense(layout, weight, getattr(module, "bias", None))
    return packed if packed.error(weight) <= packed.largest_error else None


def dense_embedding(model: nn.Module, name: str) -> nn.Embedding:
    module = dict(model.named_modules()).get(name)
    if type(module) is not nn.Embedding:
        raise ModelError(f"{type(model).__name__} has no embedding {name!r}")
    return module


def look_up_(model: Any, embeddings: dict[str, str]) -> None:
    """Make embeddings look up rows of packed layers of their shape, in place, and untie them for transformers."""
    for name, layer in embeddings.items():
        if layer == own_layer(name):
            continue
        embedding, rows = dense_embedding(model, name), dict(model.named_modules()).get(layer)
        if not isinstance(rows, PackedLinear) or embedding.weight.shape != (rows.out_features, rows.in_features):
            raise ModelError(f"embedding {name!r}: {layer!r} is not a packed layer of its shape")
        model.set_submodule(name, PackedEmbedding(rows, own=False))
    gone = {f"{name}.weight" for pair in embeddings.items() for name in pair}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        if isinstance(pairs := getattr(model, attribute, None), dict):
            left = {target: source for target, source in pairs.items() if not {target, source} & gone}
            setattr(model, attribute, left)


def check_embeddings(embeddings: Any, layers: dict[str, Any]) -> None:
    if not isinstance(embeddings, dict) or not all(isinstance(layer, str) for layer in embeddings.values()):
        raise ModelError("quantization_config does not say which layer holds the rows of an embedding; it is damaged")
    for name, layer in embeddings.items():
        if layer not in layers:
            raise ModelError(f"quantization_config, embedding {name!r}: {layer!r} is not among the packed layers")
