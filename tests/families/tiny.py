"""Tiny models of the decoder families that the installed transformers knows, from their own config classes.

Generic sizes go to the keys that a config class has; `EXCEPTIONS` lists what a family needs beside them.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from gblm_compress.models.experts import form_of
from gblm_compress.models.tiny import VOCABULARY

_OF_VALUE: dict[int, str] = {
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len seq_length",
    256: "bos_token_id eos_token_id",
    0: "pad_token_id",
    64: "hidden_size n_embd d_model dim_model embed_dim emb_dim",
    96: "intermediate_size ffn_dim dim_ff n_inner dff ffn_hidden_size intermediate_size_mlp",
    32: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank sliding_window index_topk",
    16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim global_head_dim "
    "mamba_d_head mamba_d_state mamba_head_dim ssm_state_size state_size linear_key_head_dim linear_value_head_dim "
    "hidden_size_per_layer_input",
    8: "rotary_dim mamba_n_heads mamba_num_heads",
    4: "num_attention_heads n_head n_heads attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts index_n_heads linear_num_value_heads num_mem_heads",
    2: "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok linear_num_key_heads",
    1: "first_k_dense_replace n_group topk_group",
}
SIZES = {key: value for value, keys in _OF_VALUE.items() for key in keys.split()}
"""{key of a config: what it becomes where the class has a number for it}."""

_LINEAR_FIRST = ["linear_attention", "full_attention"]
_HYBRID, _HEADS_OF_16 = {"layer_types": _LINEAR_FIRST}, {"head_dim": 16}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "num_key_value_heads": 4}
_CONV_FIRST = {"layer_types": ["conv", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2, "layer_types": _LINEAR_FIRST},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 32},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4, "intermediate_size": [96] * 4, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "git": {"vision_config": {"num_hidden_layers": 3}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 16},
    "kimi_linear": {
        "num_experts_per_token": 2, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": _LINEAR_FIRST,
    },
    "kolibri1_1": {
        "layer_types": ["sliding_attention", "indexed_attention"], "index_layers": [1], "kv_source_layers": [0, 1],
        "index_num_heads": 2, "index_pool_size": 64, "mlp_only_layers": [0], "mlp_only_intermediate_size": 96,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2_moe": {**_CONV_FIRST, "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"dense_intermediate_size": 96, "shared_intermediate_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "moe_shared_expert_intermediate_size": 32, "chunk_size": 16,
    },
    "phi4_multimodal": {"audio_config": {"num_blocks": 3}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("granitemoehybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _HYBRID),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEADS_OF_16),
    **dict.fromkeys(("inkling_text", "inkling2_text", "inkling2_loop_text"), _INKLING),
    **dict.fromkeys(("lfm2", "lfm3"), _CONV_FIRST),
    **dict.fromkeys(("zamba", "zamba2"), _ZAMBA),
}  # fmt: skip

NO_DECODERS = ("xlm", "xlnet")
"""Families that transformers lists among causal language models, and whose tokens see those after them."""


def families() -> list[str]:
    """One family for each class of causal language models: the one for text alone, where there are several.

    Encoders that can be told to decode, and decoders of encoder-decoders, are left out.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name, model in CLASSES.items():
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # it has no defaults
            continue
        encoder = getattr(config, "is_decoder", None) is False and "gpt" not in name
        if not (config.is_encoder_decoder or encoder or name in NO_DECODERS):
            found.setdefault(model, []).append((len(_parts(config)), name))
    return sorted(min(names)[1] for names in found.values())


def tiny_family(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of a family in float32, in eval mode, with random weights large enough for its parts to matter.

    `changes` are arguments of the config.
    """
    kind = CONFIG_MAPPING[name]
    config = kind(**_merged(_small(kind()), EXCEPTIONS.get(name, {}) | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[name])._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or form_of(module):
                for key, parameter in module.named_parameters(recurse=False):
                    parameter.normal_(0, 0.02 if "bias" in key else 0.1)
    return model.eval()


def _parts(config: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if hasattr(value, "model_type")}


def _small(config: Any) -> dict[str, Any]:
    small: dict[str, Any] = {key: _small(part) for key, part in _parts(config).items()}
    small |= {key: SIZES[key] for key, value in vars(config).items() if key in SIZES and type(value) is int}
    if "kv_lora_rank" in vars(config) and "num_key_value_heads" in small:  # keys and values have as many heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return one | other | both
