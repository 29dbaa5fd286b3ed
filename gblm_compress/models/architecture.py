"""The prunable weights of a transformers model: `Linear` and `Conv1D` layers in a list of blocks."""

import inspect
import re
from copy import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers.pytorch_utils import Conv1D

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.models.experts import experts_of

# Routers decide which expert runs, and stay as they are. They are found by their outputs (`_routers`), or by the name
# or the class of a module on the way to a layer: Hunyuan's is `mlp.gate.wg` in a HunYuanMoEV1Gate.
_ROUTER_NAME = re.compile(r".*router.*|gate|.*expert_gate")
_ROUTER_CLASS = re.compile(r".*Router.*|.*TopK?Gat(e|ing)|.*MoE(V\d+)?Gate", re.IGNORECASE)

# {class: whether its layers only multiply by their weight and add their bias}
_MULTIPLIES: dict[type[nn.Module], bool] = {nn.Linear: True, Conv1D: True}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one weight matrix that can be pruned."""
    kind = type_before_parametrizations(module)
    if isinstance(module, nn.Linear) and kind not in _MULTIPLIES:  # tried with a small weight
        x, weight = torch.arange(10.0).view(2, 5).sin(), torch.arange(15.0).view(3, 5).cos()
        small = copy(module)
        small._parameters = {"weight": nn.Parameter(weight), "bias": None}
        small.in_features, small.out_features = 5, 3
        try:
            _MULTIPLIES[kind] = torch.allclose(small.forward(x), x @ weight.T)
        except Exception:  # a router, say, that wants other inputs or gives other outputs
            _MULTIPLIES[kind] = False
    return _MULTIPLIES.get(kind, False)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as [in_features, out_features], as Conv1D does."""
    return isinstance(module, Conv1D)


def as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """A tensor stored like the layer's weight, as [out_features, in_features], sharing its memory."""
    return stored.T if is_transposed(module) else stored


def weight_matrix(module: Any) -> Tensor:
    """The weight of a linear layer as [out_features, in_features], sharing its memory."""
    return as_matrix(module, module.weight)


def cache_argument(model: nn.Module) -> str:
    """The name of a model's cache among the arguments of its `forward`; `ModelError` if it has none."""
    known = ("cache", "past_key_values", "state")  # of transformers 5.20 and later, of earlier ones, of RWKV
    if name := next((name for name in known if name in inspect.signature(model.forward).parameters), None):
        return name
    raise ModelError(f"{type(model).__name__} takes none of {', '.join(known)}, so it cannot continue from a cache")


def cache_kinds(config: Any) -> set[str]:
    """The transformers classes of a model's cache layers; a plain KV cache has "DynamicLayer" alone."""
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=config).layers}


def find_blocks(model: Any) -> tuple[str, list[nn.Module]]:
    """The name of the ModuleList with most of the linear weights, and its blocks; `ModelError` if there is none."""
    lists = {name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one)}
    sizes = {name: sum(weight_matrix(m).numel() for m in one.modules() if is_linear(m)) for name, one in lists.items()}
    # Other towers of a multimodal model may be larger than the one for text.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    lists = {name: one for name, one in lists.items() if id(one) in inside} or lists
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    blocks = getattr(text, "num_hidden_layers", None)
    outer = {name: one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    lists = {name: one for name, one in outer.items() if len(one) == blocks} or lists
    name = max(lists, key=lambda name: sizes[name], default=None)
    if name is None or sizes[name] == 0:
        raise ModelError(
            f"{type(model).__name__} has no prunable layer: no ModuleList of blocks with Linear or Conv1D "
            "layers was found; decoders such as Llama, Mistral, Qwen, GPT-2 and OPT have one"
        )
    return name, list(lists[name])


def prunable_layers(model: nn.Module, ignore: tuple[str, ...] = ()) -> list[dict[str, nn.Module]]:
    """{full name: layer to prune} of each block, in order; `UsageError` if a pattern of `ignore` matches no weight."""
    prefix, blocks = find_blocks(model)
    weighted = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in weighted):
            first = next((name for name, module in blocks[0].named_modules() if is_linear(module)), "…")
            raise UsageError(
                f"ignore pattern {pattern!r} matches no module of the model; "
                f"its layers are named like {f'{prefix}.0.{first}'!r} (* stands for any text)"
            )
    wanted = {name for name, _, reason in linear_weights(model, ignore) if reason is None}
    layers = [
        {name: module for name, module in block.named_modules(prefix=f"{prefix}.{index}") if name in wanted}
        for index, block in enumerate(blocks)
    ]
    if not any(layers):
        raise ModelError(
            f"no prunable layer is left: ignore {list(ignore)} matches all Linear or Conv1D layers in {prefix}"
        )
    return layers


def linear_weights(model: nn.Module, ignore: tuple[str, ...] = ()) -> list[tuple[str, int, str | None]]:
    """(name, size, why it is not pruned or None) of all weights that multiply hidden states.

    Fused experts and routers have names of parameters, others of layers.
    """
    prefix, _ = find_blocks(model)
    head, embedding = head_and_embedding(model)
    routers = _routers(model)
    seen: set[int] = set()

    def reason(name: str, module: nn.Module) -> str | None:
        if module is head:
            return "embedding tied" if embedding is not None and module.weight is embedding.weight else "head"
        if not name.startswith(prefix + "."):
            return "outside the blocks"
        if name in routers:
            return "router"
        if not is_linear(module):
            return f"layer of type {type(module).__name__}"
        return next((f"ignored by pattern {pattern!r}" for pattern in ignore if fnmatchcase(name, pattern)), None)

    found: list[tuple[str, int, str | None]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if id(module.weight) not in seen:  # a weight that blocks share belongs to the first of them
                found.append((name, module.weight.numel(), reason(name, module)))
            seen.add(id(module.weight))
            continue
        is_expert = "expert" in name.rpartition(".")[2] or "Expert" in type(module).__name__
        for own, parameter in module.named_parameters(recurse=False) if name in routers or is_expert else ():
            if "bias" not in own and parameter.dim() >= 2:
                why = "router" if name in routers else f"fused experts ({parameter.dim()}-D parameter)"
                found.append((f"{name}.{own}", parameter.numel(), why))
    return found


def head_and_embedding(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    known = hasattr(model, "get_output_embeddings")
    return (model.get_output_embeddings(), model.get_input_embeddings()) if known else (None, None)


def _routers(model: nn.Module) -> set[str]:
    """The names of routers and their parts, found by name, by class or by outputs (at most one for each expert)."""
    by_outputs, found = set(), set()
    for path, experts in experts_of(model).items():
        mixture = path.rpartition(".")[0]
        for name, module in model.get_submodule(mixture).named_modules(prefix=mixture):
            weight = module._parameters.get("weight")
            few = weight is not None and weight.dim() == 2 and len(weight) <= experts.count
            if few and not name.startswith(f"{path}."):
                by_outputs.add(name)
    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        is_router = _ROUTER_NAME.fullmatch(part) or _ROUTER_CLASS.fullmatch(type(module).__name__)
        if name and (parent in found or is_router):
            found.add(name)
    return found | by_outputs
