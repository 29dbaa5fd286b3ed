"""A tiny random Llama with a byte tokenizer: the model `tiny`."""

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 257  # bytes and one special token
SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


def random_model(config: Any, seed: int = 0) -> Any:
    """A float32 model. Its random weights are large enough for losses to depend visibly on the input."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


def build_tiny(folder: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True)
    random_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
