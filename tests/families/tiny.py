"""Tiny models of the decoder families that the installed transformers knows, from their own config classes."""

from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gblm_compress.models.tiny import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "seq_length": 512,
    "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim_model": 64, "emb_dim": 64, "embed_dim": 64,
    "intermediate_size": 96, "ffn_dim": 96, "dim_ff": 96, "n_inner": 96, "dff": 96, "ffn_hidden_size": 96, "intermediate_size_mlp": 96,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "sliding_window": 32, "rotary_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "index_topk": 32, "index_n_heads": 4, "index_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_mem_heads": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
}  # fmt: skip
"""What a config's key becomes, where its class has the key with a number in it."""

def families():
    found = {}
    for name, model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:
            continue
        if config.is_encoder_decoder or (getattr(config, "is_decoder", None) is False and "gpt" not in name):
            continue
        found.setdefault(model, []).append((len([v for v in vars(config).values() if hasattr(v, "model_type")]), name))
    return sorted(min(names)[1] for names in found.values())

def small(config, over=None):
    kwargs = {}
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, 'model_type'):
            kwargs[key] = small(value)
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            kwargs[key] = SIZES[key]
    if "kv_lora_rank" in vars(config) and "num_key_value_heads" in kwargs:
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    return {**kwargs, **(over or {})}

EXCEPTIONS = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16}, "ministral": {"head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "kimi_linear": {"num_experts_per_token": 2, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "mamba_dt_rank": 4, "mamba_d_state": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4, "num_key_value_heads": 4, "mamba_d_state": 16, "n_mamba_heads": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma3n_text": {"num_hidden_layers": 4, "intermediate_size": [96] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "laurel_rank": 8},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 32, "chunk_size": 16, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4},
    "jetmoe": {"kv_channels": 16},
    "minimax_m3_vl_text": {"dense_intermediate_size": 96, "shared_intermediate_size": 32},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "inkling2_loop_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 32},
}
def tiny_family(name, seed=0):
    import transformers
    kind = CONFIG_MAPPING[name]
    config = kind(**small(kind(), EXCEPTIONS.get(name)))
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) or hasattr(module, "is_concatenated"):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.normal_(0, 0.1 if "bias" not in name else 0.02)
    return model.eval()
