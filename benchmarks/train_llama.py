r"""Train a small Llama with its tokeniser from random weights, for measurements on weights that lie on no grid.

    python benchmarks/train_llama.py FOLDER --texts wiki_articles.txt c4_first.txt

The model has 26 million weights: 7 blocks of width 512, 8 heads of which pairs share keys and values, 8,192 tokens of
byte-level BPE. All widths divide by 256, so that llama.cpp need not put one format in the place of another.
Every fortieth window of the texts is held out, to see how it goes. A folder that is there is left as it is; a training
that was broken off goes on from its last checkpoint, in FOLDER.training.
"""

import argparse
import math
from pathlib import Path

import torch
import training
from ending import exit_after
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

HELD_OUT = 40
END = "<|endoftext|>"
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=7,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def tokeniser_of(texts: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts; token 0 begins a window."""
    learnt = ByteLevelBPETokenizer()
    learnt.train([str(path) for path in texts], vocab_size=CONFIG.vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, bos_token=END, eos_token=END)


def windows_of(tokeniser: PreTrainedTokenizerFast, texts: list[Path], length: int) -> list[dict[str, list[int]]]:
    """The texts in windows of `length` tokens; what is left of each at its end is dropped."""
    windows = []
    for path in texts:
        tokens = tokeniser(path.read_text(encoding="utf-8"))["input_ids"]
        for start in range(0, len(tokens) - length + 1, length):
            window = tokens[start : start + length]
            windows.append({"input_ids": window, "labels": window})
    return windows


def train(
    folder: Path, texts: list[Path], epochs: float, batch: int, rate: float, length: int, config: LlamaConfig = CONFIG
) -> dict[str, float]:
    """Train, and write the model with its tokeniser as a folder of transformers.

    Args:
        length: tokens in a window.

    Returns:
        The metrics of the windows that are held out, among them the loss in nats per token.
    """
    tokeniser = tokeniser_of(texts)
    windows = windows_of(tokeniser, texts, length)
    held_out = windows[::HELD_OUT]
    learnt = [window for index, window in enumerate(windows) if index % HELD_OUT]
    torch.manual_seed(0)
    trainer = Trainer(
        LlamaForCausalLM(config),
        training.arguments(
            folder,
            epochs,
            batch,
            rate,
            per_device_eval_batch_size=batch,
            warmup_steps=100,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=True,
            logging_steps=50,
        ),
        train_dataset=learnt,
        eval_dataset=held_out,
    )
    return training.train(trainer, folder, tokeniser)


def main() -> None:
    """Train unless the folder is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--sequence-length", type=int, default=512)
    options = parser.parse_args()
    if options.folder.exists():
        print(f"{options.folder} is there already")
        return
    if missing := [str(path) for path in options.texts if not path.is_file()]:
        parser.error(f"no such text: {', '.join(missing)}")
    how = options.epochs, options.batch, options.rate, options.sequence_length
    metrics = train(options.folder, options.texts, *how)
    print(f"held-out perplexity {math.exp(metrics['eval_loss']):.1f}")


if __name__ == "__main__":
    exit_after(main)
