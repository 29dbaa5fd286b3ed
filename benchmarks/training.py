"""How the benchmarks' own models are trained: by transformers' Trainer, resumable, the folder whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of a training lie until FOLDER is there."""
    return folder.with_name(f"{folder.name}.training")


def arguments(folder: Path, epochs: float, batch: int, rate: float, **others: Any) -> TrainingArguments:
    """A rate that falls as a cosine, and a look and a checkpoint after every epoch."""
    return TrainingArguments(
        output_dir=str(checkpoints_of(folder)),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        **others,
    )


def train(trainer: Trainer, folder: Path, processor: Any) -> dict[str, float]:
    """Train, from the last checkpoint on if there is one, and write the model with its processor as FOLDER.

    Returns:
        The metrics of what is held out.
    """
    checkpoints = checkpoints_of(folder)
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    metrics: dict[str, float] = trainer.evaluate()
    model: Any = trainer.model
    model.save_pretrained(checkpoints / "last")
    processor.save_pretrained(checkpoints / "last")
    (checkpoints / "last").rename(folder)
    shutil.rmtree(checkpoints)
    return metrics
