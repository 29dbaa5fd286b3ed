"""The keys of `config.json` that are read here, with the types they must have; others are for transformers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

_Number = Annotated[int, Field(ge=1, le=2**31)]


class ConfigKeys(BaseModel):
    """Strict about types, so that nothing later meets a text where it expects a number."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model_type: str
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    vocab_size: _Number | None = None
    hidden_size: _Number | None = None
    intermediate_size: _Number | list[_Number] | None = None
    num_hidden_layers: _Number | None = None
    num_attention_heads: _Number | list[_Number] | None = None
    max_position_embeddings: _Number | None = None
    n_embd: _Number | None = None
    n_layer: _Number | None = None
    n_head: _Number | list[_Number] | None = None
    n_positions: _Number | None = None
    rope_scaling: dict[str, JsonValue] | None = None
    rope_parameters: dict[str, JsonValue] | None = None
    quantization_config: dict[str, JsonValue] | None = None
    transformers_weights: str | None = None
