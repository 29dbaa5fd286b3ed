"""The keys of `config.json` that are read here, with the types they must have; others are for transformers."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def first_of(config: Any, names: Iterable[str]) -> Any:
    """What a config says under the first of these names that it has; None where it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


_Number = Annotated[int, Field(ge=1, le=2**31)]
_Experts = Annotated[int, Field(ge=0, le=2**31)]  # 0 in models without


def _no_repository(implementation: str | dict[str, str]) -> str | dict[str, str]:
    if any("/" in name for name in (implementation.values() if isinstance(implementation, dict) else [implementation])):
        raise ValueError("a kernel from the Hugging Face hub is code, which is not run; remove the key")
    return implementation


_Attention = Annotated[str | dict[str, str], AfterValidator(_no_repository)]


class _Decoder(BaseModel):
    """What describes a decoder: at the top of the file, or in `text_config` where the model has other parts too."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    attn_implementation: _Attention | None = None
    own_attn_implementation: _Attention | None = Field(None, alias="_attn_implementation")
    vocab_size: _Number | None = None
    hidden_size: _Number | None = None
    intermediate_size: _Number | list[_Number] | None = None
    num_hidden_layers: _Number | None = None
    num_layers: _Number | None = None
    n_layers: _Number | None = None
    num_attention_heads: _Number | list[_Number] | None = None
    max_position_embeddings: _Number | None = None
    n_embd: _Number | None = None
    n_layer: _Number | None = None
    n_head: _Number | list[_Number] | None = None
    n_positions: _Number | None = None
    num_experts: _Experts | None = None
    num_local_experts: _Experts | None = None
    n_routed_experts: _Experts | None = None
    moe_num_experts: _Experts | list[_Experts] | None = None
    rope_scaling: dict[str, JsonValue] | None = None
    rope_parameters: dict[str, JsonValue] | None = None


class ConfigKeys(_Decoder):
    """Strict about types, so that nothing later meets a text where it expects a number."""

    model_type: str
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    text_config: _Decoder | None = None
    quantization_config: dict[str, JsonValue] | None = None
    transformers_weights: str | None = None
