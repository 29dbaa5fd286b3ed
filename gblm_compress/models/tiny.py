"""Tiny random models with a byte tokenizer: the model `tiny`, and models for tests."""

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 257  # bytes and one special token
_SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
_LLAMA = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gpt2": _SIZES,
    "opt": {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 256},
}


def tiny_config(kind: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**_KINDS[kind])


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A tiny float32 model. Its random weights are large enough for losses to depend visibly on the input."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.15)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.05)
    return model.eval()


def byte_tokenizer() -> Any:
    """A tokenizer with a token for each byte and `<|end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def build_tiny(kind: str, folder: Path, seed: int = 0) -> None:
    tiny_model(kind, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
