r"""Rescale a Llama so that it computes the same from weights that lie on no grid, for measurements of 4-bit formats.

    python benchmarks/off_the_grid.py MODEL FOLDER

The demo model's weights come from a 4-bit file, so that 4-bit formats near its grid look better than they are. Here
every input channel of every linear layer of the blocks is multiplied by a factor of its own between 0.8 and 1.25, and
what feeds it is divided by that: the norm before q, k, v, gate and up; v before o; up before down. Zeros stay zeros,
and scores of magnitude × input norm or gradient norm stay as they are, so that a pruned model may be rescaled as well.
Head and embedding stay as they are. The logits of both models are compared before anything is written.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from ending import exit_after
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.progress import Progress
from gblm_compress.storage.outputs import MANIFEST

SPREAD = 1.25
"""The largest factor, and one over the smallest."""


def factors(count: int, draws: torch.Generator) -> Tensor:
    """Numbers between 1/`SPREAD` and `SPREAD`, uniform in their logarithm."""
    return torch.exp((2 * torch.rand(count, generator=draws) - 1) * math.log(SPREAD))


def rescale_(model: LlamaForCausalLM, seed: int) -> None:
    """Multiply the input channels of all linear layers in the blocks, and divide what feeds them."""
    draws = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels = factors(len(norm.weight), draws)
            norm.weight /= channels
            for reader in readers:
                reader.weight *= channels
        _between_(mlp.up_proj, mlp.down_proj, factors(mlp.up_proj.out_features, draws))
        # A head of v feeds several heads of q, whose outputs o reads one after the other.
        heads = attention.v_proj.out_features // attention.head_dim
        channels = factors(attention.v_proj.out_features, draws)
        read = channels.reshape(heads, 1, -1).expand(-1, attention.num_key_value_groups, -1).flatten()
        _between_(attention.v_proj, attention.o_proj, channels, read)


def _between_(before: nn.Linear, after: nn.Linear, channels: Tensor, read: Tensor | None = None) -> None:
    before.weight /= channels[:, None]
    if before.bias is not None:
        before.bias /= channels
    after.weight *= channels if read is None else read


def main() -> None:
    """Rescale, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    silence_libraries()
    source = resolve_model(options.model, Progress(quiet=True))
    model, processor = load_model(source, "float32"), load_processor(source)
    if not isinstance(model, LlamaForCausalLM):
        raise SystemExit(f"{options.model} is a {type(model).__name__}; give a Llama")
    text = processor("The weights have changed, and what they compute has not.", return_tensors="pt")
    before = model(**text).logits
    rescale_(model, options.seed)
    error = float((model(**text).logits - before).norm() / before.norm())
    if error > 1e-4:
        raise SystemExit(f"the rescaled model computes something else: its logits differ by {error:.1e}")
    model.save_pretrained(options.folder)
    processor.save_pretrained(options.folder)
    if (source.folder / MANIFEST).exists():
        shutil.copy(source.folder / MANIFEST, options.folder)
    print(f"{options.folder}: logits within {error:.1e} of {options.model}'s")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    exit_after(main)
