"""Where a transformers decoder keeps the weights that pruning is for: its blocks and their linear layers.

Nothing here knows a model by name. A decoder is a model with a `ModuleList` of blocks; what is pruned are
the `Linear` and `Conv1D` modules inside them, so that embeddings, heads and norms are out of reach.
"""

import inspect
import re
from collections.abc import Iterator
from copy import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.models.experts import experts_of

# Routers decide which expert runs; a pruned one changes the model's wiring, not its precision. A router is told by what
# it does, see `_routers`, or by the name or the class of any module on the way to a layer: Hunyuan's is `mlp.gate.wg`
# in a HunYuanMoEV1Gate, JetMoe's `mlp.router.layer` in a JetMoeTopKGating. A `gate_proj` is an ordinary layer.
_ROUTER_NAME = re.compile(r".*router.*|gate|.*expert_gate")
_ROUTER_CLASS = re.compile(r".*Router.*|.*TopK?Gat(e|ing)|.*MoE(V\d+)?Gate", re.IGNORECASE)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one weight matrix that can be pruned."""
    kind = type(module)
    if isinstance(module, nn.Linear) and kind not in _MULTIPLIES:
        _MULTIPLIES[kind] = _multiplies(module)
    return _MULTIPLIES.get(kind, False)


_MULTIPLIES: dict[type[nn.Module], bool] = {nn.Linear: True, Conv1D: True}
"""Whether a class of layers only multiplies by its weight and adds its bias, of those that were asked for."""


def _multiplies(module: nn.Linear) -> bool:
    """Whether a layer of a subclass of `Linear` gives x·Wᵀ, as seen on small numbers in place of its weight."""
    x, weight = torch.arange(10.0).view(2, 5).sin(), torch.arange(15.0).view(3, 5).cos()
    small = copy(module)
    small._parameters = {"weight": nn.Parameter(weight), "bias": None}
    small.in_features, small.out_features = 5, 3
    try:
        return torch.allclose(small.forward(x), x @ weight.T)
    except Exception:  # a router, say, that wants other inputs or gives other outputs
        return False


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as [in_features, out_features], as GPT-2's Conv1D does."""
    return isinstance(module, Conv1D)


def as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """A tensor in the stored layout of the layer's weight, as [out_features, in_features], sharing its memory."""
    return stored.T if is_transposed(module) else stored


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out_features, in_features], sharing its memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_matrix(module, weight)


def cache_argument(model: nn.Module) -> str:
    """What a model calls what it hands on from token to token: `past_key_values`, `cache` from transformers 5.20 or so
    on, or `state` (RWKV).

    Raises:
        ModelError: it hands on nothing of the kind.
    """
    known = ("cache", "past_key_values", "state")
    name = next((name for name in known if name in inspect.signature(model.forward).parameters), None)
    if name is None:
        raise ModelError(
            f"{type(model).__name__} takes none of {', '.join(known)}, so that it cannot go on from a cache"
        )
    return name


def cache_kinds(config: Any) -> set[str]:
    """The classes of transformers that hold the cache of a model; a plain KV cache is of "DynamicLayer" alone."""
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=config).layers}


def sliding_windows(config: Any) -> list[int | None]:
    """How many tokens the cache of each layer may forget those before; None for a layer without a window."""
    from transformers import DynamicCache

    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the ModuleList that holds most of the linear weights, and its blocks in order.

    Raises:
        ModelError: there is none.
    """

    def linear_weights(module: nn.Module) -> int:
        return sum(weight_matrix(m).numel() for m in module.modules() if is_linear(m))

    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    for narrower in (_in_decoder, _of_text_length):  # other towers of the model may be larger
        lists = narrower(model, lists) or lists
    name = max(lists, key=lambda name: linear_weights(lists[name]), default=None)
    if name is None or linear_weights(lists[name]) == 0:
        raise ModelError(
            f"{type(model).__name__} has no prunable layer: no ModuleList of blocks with Linear or Conv1D "
            "layers was found; decoders such as Llama, Mistral, Qwen, GPT-2 and OPT have one"
        )
    return name, list(lists[name])


_Lists = dict[str, nn.ModuleList]


def _in_decoder(model: nn.Module, lists: _Lists) -> _Lists:
    """Those in the part of a model that makes text from tokens."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    within = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    return {name: module for name, module in lists.items() if id(module) in within}


def _of_text_length(model: Any, lists: _Lists) -> _Lists:
    """Those of as many blocks as the config says that the part for text has, unless they are within a block."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    layers = getattr(text, "num_hidden_layers", None)
    outer = {name: one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    return {name: module for name, module in outer.items() if len(module) == layers}


def prunable_layers(
    model: nn.Module, targets: tuple[str, ...] = ("*",), ignore: tuple[str, ...] = ()
) -> list[dict[str, nn.Module]]:
    """The layers to prune, block by block, as {full name: module} in the model's order.

    Args:
        model: a decoder.
        targets: shell-style patterns over full module names; a layer must match one.
        ignore: patterns whose matches are left alone, beside the routers, which always are.

    Raises:
        UsageError: a pattern matches no weight of the model.
        ModelError: nothing is left to prune.
    """
    prefix, blocks = find_blocks(model)
    weighted = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in weighted):
                raise UsageError(
                    f"{option} pattern {pattern!r} matches no module of the model; "
                    f"its layers are named like {prefix + '.0.' + _first_linear(blocks[0])!r} "
                    "(* stands for any text)"
                )
    wanted = {name for name, _, reason in linear_weights(model, targets, ignore) if reason is None}
    layers = [
        {
            full_name: module
            for name, module in block.named_modules()
            if (full_name := f"{prefix}.{index}.{name}") in wanted
        }
        for index, block in enumerate(blocks)
    ]
    if not any(layers):
        raise ModelError(
            f"no prunable layer is left: targets {list(targets)} less ignore {list(ignore)} selects none of the "
            f"Linear or Conv1D layers in {prefix}"
        )
    return layers


def linear_weights(
    model: nn.Module, targets: tuple[str, ...] = ("*",), ignore: tuple[str, ...] = ()
) -> list[tuple[str, int, str | None]]:
    """Every weight by which the model multiplies its hidden states, as (name, number of weights, why it is not pruned).

    The reason is None for the layers that are pruned, unless an override or the allocation leaves one dense. Names are
    those of layers, or of parameters where no layer of its own holds the weight (fused experts, routers). Works on
    models whose parameters are on the meta device.

    Args:
        targets: as for `prunable_layers`.
        ignore: as for `prunable_layers`.
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
        if name in routers or _is_router(model, name):
            return "router"
        if not is_linear(module):
            return f"layer of type {type(module).__name__}"
        if not any(fnmatchcase(name, pattern) for pattern in targets):
            return "not targeted"
        matches = (pattern for pattern in ignore if fnmatchcase(name, pattern))
        return next((f"ignored by pattern {pattern!r}" for pattern in matches), None)

    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if id(module.weight) not in seen:  # a weight that blocks share belongs to the first of them
                found.append((name, module.weight.numel(), reason(name, module)))
            seen.add(id(module.weight))
        else:
            found += [
                (f"{name}.{parameter_name}", parameter.numel(), why)
                for parameter_name, parameter, why in _bare_matrices(model, name, module, name in routers)
            ]
    return found


def head_and_embedding(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The layer that makes logits and the embedding of tokens, where the model says which they are."""
    if not hasattr(model, "get_output_embeddings"):
        return None, None
    return model.get_output_embeddings(), model.get_input_embeddings()


def _bare_matrices(
    model: nn.Module, name: str, module: nn.Module, routes: bool
) -> Iterator[tuple[str, nn.Parameter, str]]:
    """The matrices that a module holds itself, with why they are not pruned: experts in one tensor, and routers."""
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if "bias" in parameter_name or parameter.dim() < 2:
            continue
        if routes or _is_router(model, name):
            yield parameter_name, parameter, "router"
        elif "expert" in name.rpartition(".")[2] or "Expert" in type(module).__name__:
            yield parameter_name, parameter, f"fused experts ({parameter.dim()}-D parameter)"


def _routers(model: nn.Module) -> set[str]:
    """The paths of what decides between the experts of mixtures: beside the experts, a module whose matrix has an
    output for each of them, or for fewer (one gate for the experts that are shared, say).
    """
    found = set()
    for path, experts in experts_of(model).items():
        mixture = path.rpartition(".")[0]
        for name, module in model.get_submodule(mixture).named_modules(prefix=mixture):
            weight = module._parameters.get("weight")
            few = weight is not None and weight.dim() == 2 and len(weight) <= experts.count
            if few and not name.startswith(f"{path}."):
                found.add(name)
    return found


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` is a router or part of one."""
    module = model
    for part in name.split("."):
        module = module.get_submodule(part)
        if _ROUTER_NAME.fullmatch(part) or _ROUTER_CLASS.fullmatch(type(module).__name__):
            return True
    return False


def _first_linear(block: nn.Module) -> str:
    return next((name for name, module in block.named_modules() if is_linear(module)), "…")
