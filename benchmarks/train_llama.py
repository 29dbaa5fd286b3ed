r"""Train a small Llama from random weights, for measurements that need weights of full precision.

    python benchmarks/train_llama.py FOLDER --text wiki_articles.txt c4_sample.txt --epochs 6

The demo model's weights come from a 4-bit file, so that 4-bit formats near its grid look better than they are. This
model has 22 million weights that never saw a grid. The tokenizer is byte-level BPE, trained on the same text. The last
twentieth of every file is held out; the weights with the lowest loss there are kept. A folder that is there is left
as it is; a training that was broken off goes on from its last checkpoint, in FOLDER.training.
"""

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from gblm_compress.calibration.products import faster_dtype
from gblm_compress.calibration.ranks import Ranks

END = "<|endoftext|>"
HELD_OUT = 20


def bpe_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token=END, eos_token=END)


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> list[dict[str, torch.Tensor]]:
    """Windows [length] of all texts, one after the other without overlap."""
    ids = torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts])
    return [
        {"input_ids": window, "labels": window} for window in ids[: len(ids) // length * length].reshape(-1, length)
    ]


def train(folder: Path, texts: list[str], length: int, epochs: float, batch: int, rate: float) -> dict[str, float]:
    """Train, and write the model with its tokenizer as a folder of transformers.

    Returns:
        The metrics of the windows that are held out.
    """
    cuts = [len(text) - len(text) // HELD_OUT for text in texts]
    learnt = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    held_out = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    tokenizer = bpe_tokenizer(learnt, vocabulary=8192)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=0.1,
    )
    checkpoints = folder.with_name(f"{folder.name}.training")
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=faster_dtype("cuda" if torch.cuda.is_available() else "cpu", Ranks()) == "bfloat16",
            logging_steps=100,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=windows(tokenizer, learnt, length),
        eval_dataset=windows(tokenizer, held_out, length),
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    found = trainer.evaluate()
    trainer.model.save_pretrained(checkpoints / "best")
    tokenizer.save_pretrained(checkpoints / "best")
    (checkpoints / "best").rename(folder)
    shutil.rmtree(checkpoints)
    return found


def main() -> None:
    """Train unless the folder is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    if options.folder.exists():
        print(f"{options.folder} is there already")
        return
    texts = [path.read_text() for path in options.text]
    found = train(options.folder, texts, options.length, options.epochs, options.batch, options.rate)
    print({name: round(value, 3) for name, value in found.items()})


if __name__ == "__main__":
    main()
