r"""Train a small vision transformer on Fashion-MNIST from random weights, for measurements on real images.

    python benchmarks/fashion_mnist.py images
    python benchmarks/train_vit.py FOLDER --images images/train.parquet

The images have 28×28 pixels, one channel, ten classes. The model sees 16 patches of 7×7 and has 0.2 million weights;
`--architecture swin` trains a Swin of as many, which sees 196 patches of 2×2 in its first stage and 49 in its second.
The last twelfth of the training images is held out, to see how it goes; the 10,000 test images have no part in it. A
folder that is there is left as it is; a training that was broken off goes on from its last checkpoint, in
FOLDER.training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import training
from ending import exit_after
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    Trainer,
    ViTConfig,
    ViTImageProcessor,
)

from gblm_compress.tasks import image_classification as images

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_NAMES = {
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: index for index, name in enumerate(CLASSES)},
}
CONFIGS = {
    "vit": ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        num_channels=1,
        **_NAMES,
    ),
    "swin": SwinConfig(
        embed_dim=32,
        depths=[2, 3],
        num_heads=[2, 4],
        window_size=7,
        image_size=28,
        patch_size=2,
        num_channels=1,
        **_NAMES,
    ),
}
HELD_OUT = 12
CHUNK = 1000


def preprocessed(processor: Any, pictures: list[images.Picture]) -> list[dict[str, Any]]:
    """What the model reads: images [1, 28, 28], each with its label."""
    found = []
    for start in range(0, len(pictures), CHUNK):
        chunk = pictures[start : start + CHUNK]
        pixels = processor([picture.read("L") for picture in chunk], return_tensors="pt")["pixel_values"]
        found += [{"pixel_values": one, "labels": picture.label} for one, picture in zip(pixels, chunk, strict=True)]
    return found


def accuracy(predicted: tuple[Any, Any]) -> dict[str, float]:
    """The share of images whose class is found, as `Trainer` asks for it."""
    logits, labels = predicted
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def started(architecture: str, checkpoints: Path) -> Any:
    """The model of the last checkpoint, or a new one.

    `Trainer` loads a checkpoint by the names of the modules, and those of the file are other ones.
    """
    if found := sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        return AutoModelForImageClassification.from_pretrained(found[-1])
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(CONFIGS[architecture])


def train(
    architecture: str, folder: Path, data: str, epochs: float, batch: int, rate: float, limit: int | None
) -> dict[str, float]:
    """Train, and write the model with its image processor as a folder of transformers.

    Args:
        limit: training images at most; None for all.

    Returns:
        The metrics of the images that are held out.
    """
    processor = ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5])
    samples = preprocessed(processor, list(images.read(data, "calibration", None, seed=0)[0][:limit]))
    learnt = len(samples) - len(samples) // HELD_OUT
    model = started(architecture, training.checkpoints_of(folder))
    trainer = Trainer(
        model,
        training.arguments(
            folder,
            epochs,
            batch,
            rate,
            per_device_eval_batch_size=500,
            warmup_steps=200,
            weight_decay=0.05,
            logging_steps=100,
        ),
        train_dataset=samples[:learnt],
        eval_dataset=samples[learnt:],
        compute_metrics=accuracy,
    )
    return training.train(trainer, folder, processor)


def main() -> None:
    """Train unless the folder is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", required=True, help="The dataset to train on.")
    parser.add_argument("--architecture", choices=CONFIGS, default="vit")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, help="training images at most; all of them unless given")
    options = parser.parse_args()
    if options.folder.exists():
        print(f"{options.folder} is there already")
        return
    how = options.epochs, options.batch, options.rate, options.limit
    metrics = train(options.architecture, options.folder, options.images, *how)
    print({name: round(value, 3) for name, value in metrics.items()})


if __name__ == "__main__":
    exit_after(main)
