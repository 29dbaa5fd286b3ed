"""Head and embedding of a model in a packed layout: one layer for both where the model ties them.

`quantization_config` names each embedding with the layer whose rows it looks up: the head, or one of its own.
"""

from typing import Any

from torch import Tensor, nn

from gblm_compress.errors import ModelError
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_embedding import OWN, PackedEmbedding
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.architecture import head_and_embedding


def own_layer(embedding: str) -> str:
    """The name of the layer in an embedding that has one of its own."""
    return f"{embedding}.{OWN}"


def pack_tables_(model: Any, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Replace head and embedding of a model, in place, where they are of the plain kinds and the layout can hold them.

    Returns:
        {packed layer: the dense weight}, and {embedding: the layer whose rows it looks up}.
    """
    head, embedding = head_and_embedding(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", head)
    plain = type(embedding) is nn.Embedding  # others scale what they look up
    dense: dict[str, Tensor] = {}
    embeddings: dict[str, str] = {}
    if type(head) is nn.Linear and (plain or not tied) and (packed := _packed(head, layout)):
        dense[names[id(head)]] = head.weight.detach()
        model.set_submodule(names[id(head)], packed)
        if tied:
            embeddings[names[id(embedding)]] = names[id(head)]
            model.set_submodule(names[id(embedding)], PackedEmbedding(packed, own=False))
    if type(embedding) is nn.Embedding and not tied and (packed := _packed(embedding, layout)):
        name = names[id(embedding)]
        dense[own_layer(name)], embeddings[name] = embedding.weight.detach(), own_layer(name)
        model.set_submodule(name, PackedEmbedding(packed, own=True))
    untie_(model, embeddings)
    return dense, embeddings


def _packed(module: Any, layout: str) -> PackedLinear | None:
    weight = module.weight.detach()
    packed = LAYOUTS[layout].layer.from_dense(weight, getattr(module, "bias", None))
    return packed if packed.error(weight) <= packed.LARGEST_ERROR else None


def dense_embedding(model: nn.Module, name: str) -> nn.Embedding:
    """The embedding of that name.

    Raises:
        ModelError: there is none.
    """
    module = dict(model.named_modules()).get(name)
    if type(module) is not nn.Embedding:
        raise ModelError(f"{type(model).__name__} has no embedding {name!r}")
    return module


def look_up_(model: Any, embeddings: dict[str, str]) -> None:
    """Let embeddings look up rows of packed layers of the model, in place.

    Raises:
        ModelError: a name is not that of an embedding, or of a packed layer of its shape.
    """
    for name, layer in embeddings.items():
        if layer == own_layer(name):
            continue
        embedding, rows = dense_embedding(model, name), dict(model.named_modules()).get(layer)
        if not isinstance(rows, PackedLinear) or embedding.weight.shape != (rows.out_features, rows.in_features):
            raise ModelError(f"embedding {name!r}: {layer!r} is no packed layer of its shape")
        model.set_submodule(name, PackedEmbedding(rows, own=False))
    untie_(model, embeddings)


def untie_(model: Any, embeddings: dict[str, str]) -> None:
    """Have transformers no longer tie weights that are one packed layer now."""
    gone = {f"{name}.weight" for pair in embeddings.items() for name in pair}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        if isinstance(pairs := getattr(model, attribute, None), dict):
            left = {target: source for target, source in pairs.items() if not {target, source} & gone}
            setattr(model, attribute, left)


def check_embeddings(embeddings: Any, layers: dict[str, Any]) -> None:
    """Hold what a folder's config.json says of embeddings against what it says of layers.

    Raises:
        ModelError: it names no layer for one.
    """
    if not isinstance(embeddings, dict) or not all(isinstance(layer, str) for layer in embeddings.values()):
        raise ModelError("quantization_config does not say which layer holds the rows of an embedding; it is damaged")
    for name, layer in embeddings.items():
        if layer not in layers:
            raise ModelError(f"quantization_config, embedding {name!r}: {layer!r} is not among the packed layers")
