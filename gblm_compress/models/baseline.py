"""Whether one model may be held against another: a figure against some other model's says nothing."""

from typing import Any

from gblm_compress.errors import UsageError
from gblm_compress.models import manifest
from gblm_compress.models.source import ModelSource
from gblm_compress.storage.outputs import MANIFEST

# What config.json says of a model's architecture and shapes, in the words of all families.
SHAPES = (
    "model_type", "architectures", "vocab_size",
    "hidden_size", "n_embd", "d_model",
    "num_hidden_layers", "n_layer", "n_layers", "num_layers",
    "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size",
    "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip


def check_baseline(model: ModelSource, baseline: ModelSource) -> None:
    """Raises:
    UsageError: `baseline` has another architecture or other shapes than `model`, or is another model than the one that
        the manifest of `model` names; an export without a manifest is held against it by shape alone.
    """
    ours, theirs = _shapes(model), _shapes(baseline)
    for key in SHAPES:
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise UsageError(
                f"{baseline.name!r} is no baseline of {model.name!r}: its {key} is {theirs[key]!r}, the model's "
                f"{ours[key]!r}; give the dense model that it was made from"
            )
    base, origin = _base_model(model), _base_model(baseline)
    if base is None or (origin is None and baseline.is_export):
        return
    if base.get("sha256") not in ((origin or {}).get("sha256"), baseline.fingerprint):
        raise UsageError(
            f"{baseline.name!r} is no baseline of {model.name!r}, which was made from {base.get('name')!r} by its "
            f"{MANIFEST}: the contents of the files differ; give that model, or an export of it"
        )


def _shapes(source: ModelSource) -> dict[str, Any]:
    config = source.config | (source.config.get("text_config") or {})
    return {key: config[key] for key in SHAPES if config.get(key) is not None}


def _base_model(source: ModelSource) -> dict[str, Any] | None:
    """Name and fingerprint of the dense model that a folder of ours comes from; None for other folders."""
    return manifest.read(source.folder)["base_model"] if manifest.is_ours(source.folder) else None
