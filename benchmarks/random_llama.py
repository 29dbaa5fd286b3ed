"""Write a decoder with random weights, by default a Llama, as a Hugging Face folder, one shard a block.

    python benchmarks/random_llama.py FOLDER --preset tinyllama-1.1b

Never more than one shard is in memory, so that a small machine can write a large model. Matrices are normal with a
deviation of 0.02, norms are ones. The tokenizer knows bytes, so that any text file calibrates it.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from ending import exit_after
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from gblm_compress.models.loading import save_processor
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer

DEVIATION = 0.02
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        tied: the head is the embeddings.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def matrices(self) -> dict[str, tuple[int, int]]:
        """{name within a block: [out_features, in_features]} of its linear layers."""
        narrow = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


PRESETS = {
    "tinyllama-1.1b": Shape(2048, 5632, blocks=22, heads=32, kv_heads=4, vocabulary=32000),
    "llama-3.2-1b": Shape(2048, 8192, blocks=16, heads=32, kv_heads=8, vocabulary=128256, tied=True),
    "llama-3.2-3b": Shape(3072, 8192, blocks=28, heads=24, kv_heads=8, vocabulary=128256, tied=True),
    "llama-3.1-8b": Shape(4096, 14336, blocks=32, heads=32, kv_heads=8, vocabulary=128256),
    "llama-3.1-70b": Shape(8192, 28672, blocks=80, heads=64, kv_heads=8, vocabulary=128256),
}


def write_random(
    folder: Path, config: PreTrainedConfig, dtype: str = "bfloat16", seed: int = 0, zeros: bool = False
) -> int:
    """Write a decoder and its tokenizer; the same bytes for the same arguments.

    Args:
        folder: is made, and must not exist.
        config: of the model; tokens of its own are replaced by those of the tokenizer.
        dtype: of every tensor: bfloat16, float16 or float32.
        zeros: of every four weights in a row of a block the two smaller ones are zero.

    Returns:
        Bytes of all tensors.
    """
    if config.vocab_size < VOCABULARY:
        raise SystemExit(f"--vocab {config.vocab_size} is too small: the tokenizer has {VOCABULARY} tokens")
    folder.mkdir(parents=True)
    config.bos_token_id = config.eos_token_id = VOCABULARY - 1
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shards: dict[str, dict[str, Tensor]] = {}  # embeddings, one for each block, norm and head
    for name, parameter in model.named_parameters():
        shard = re.search(r"\.layers\.\d+\.|embed", name)
        shards.setdefault(shard[0] if shard else "end", {})[name] = parameter
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(one.shape, getattr(torch, dtype), generator) for name, one in shapes.items()}
        for name, tensor in tensors.items():
            if zeros and ".layers." in name and tensor.dim() > 1:
                fours = tensor.view(-1, 4)
                fours.scatter_(1, fours.abs().argsort()[:, :2], 0)
        tensors = {name: one.contiguous() for name, one in revert_weight_conversion(model, tensors).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    config.save_pretrained(folder)
    save_processor(byte_tokenizer(), folder)
    return total


def _random(size: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(0, DEVIATION, generator=generator)


def main() -> None:
    """Write the folder and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, help="all sizes at once")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    own = (options.hidden, options.intermediate, options.blocks, options.heads, options.kv_heads, options.vocab)
    shape = PRESETS[options.preset] if options.preset else Shape(*own)
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists; give another folder")
    written = write_random(options.folder, shape.config(), options.dtype, options.seed)
    print(f"{options.folder}: {written / 1e6:,.0f} MB in {shape.blocks} blocks")


if __name__ == "__main__":
    exit_after(main)
