"""Classification of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import DataError, ModelError, first_line, is_out_of_memory
from gblm_compress.tasks import images
from gblm_compress.tasks.classes import Classes
from gblm_compress.tasks.images import Label, Picture, Pictures
from gblm_compress.tasks.metrics import Metric, mean_metric
from gblm_compress.tasks.task import IMAGE_PROCESSOR, Sample, with_draws

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MODES = {1: "L", 3: "RGB"}
"""The mode of Pillow that an image is converted to, by the model's channels."""

TOP = 5


class ImageClassification(Classes):
    """Samples are single images as the model's image processor makes them; labels are read where the data has them."""

    help = "a model that classifies images"
    optimum = "image-classification"
    auto_class = "AutoModelForImageClassification"
    processor = IMAGE_PROCESSOR
    varying_axes = 1
    sample = "image"
    reads = images.READS

    def check_processor(self, processor: Any) -> None:
        if "pixel_values" not in processor.model_input_names:
            raise ModelError(f"its image processor makes {', '.join(processor.model_input_names)}, and no pixel_values")

    def data_files(self, dataset: str) -> list[Path]:
        return images.data_files(dataset)

    def calibration(
        self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int
    ) -> list[Sample]:
        pictures = images.read(dataset, "calibration", samples, seed)
        if len(pictures.found) < samples:
            raise DataError(
                f"dataset {dataset!r} has {len(pictures.found)} images, and {samples} are asked for; give fewer samples"
            )
        return with_draws(list(Preprocessed(processor, config, pictures)), seed)

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Sequence[Sample]:
        """All images in the dataset's order; where there is a limit, drawn at random, for folders go class by class."""
        return Preprocessed(processor, config, images.read(dataset, "evaluation", limit, seed=0))

    def probe(self, processor: Any, config: Any) -> Sample:
        """A made image, of large and small blots: no photograph is on every machine."""
        made = _made(256, _mode(config))
        return {"pixel_values": _pixels(processor, config, made, "a made image")}

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, config.num_channels, *_size(config), generator=generator)}

    def example(self, config: Any) -> Sample:
        return self.timed(config, 2, 0, seed=0)

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """Logits [1, classes]."""
        return prediction

    def measure(self, judged: Tensor, sample: Sample) -> tuple[float, ...] | None:
        """Whether the label is the likeliest class, whether it is among the five likeliest, and the cross-entropy."""
        if "labels" not in sample:
            return None
        likeliest = judged[0].topk(min(TOP, judged.shape[-1])).indices == sample["labels"]
        return float(likeliest[0]), float(likeliest.any()), float(self.loss(judged, sample))

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        """Accuracy of the likeliest class and of the five likeliest, and cross-entropy; nothing without labels."""
        if measured[0] is None:
            return {}
        names = ("top1_accuracy", f"top{TOP}_accuracy", "cross_entropy")
        return {name: mean_metric(values) for name, values in zip(names, zip(*measured, strict=True), strict=True)}


class Preprocessed(Sequence[Sample]):
    """Samples that are read and processed each time they are asked for; the labels are looked at once, before.

    Raises:
        DataError: a label is none of the model's.
        ModelError: the model takes neither grey images nor colours.
    """

    def __init__(self, processor: Any, config: Any, pictures: Pictures) -> None:
        self._processor, self._config, self._pictures = processor, config, pictures.found
        self._mode = _mode(config)
        self._labels = labels_of(pictures, config)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        import torch

        picture = self._pictures[index]
        pixels = _pixels(self._processor, self._config, picture.read(self._mode), picture.where)
        label = {"labels": torch.tensor([self._labels[index]])} if self._labels else {}
        return {"pixel_values": pixels, **label}


def labels_of(pictures: Pictures, config: Any) -> list[int]:
    """The numbers of all images' classes; none where the data has no classes.

    Names are those of the model, in capitals or not. Where none of the dataset's names is, and it has as many as the
    model has classes, they are the model's in alphabetical order: so do `torchvision` and folders of ImageNet.

    Raises:
        DataError: a label is none of the model's, or an image has none, and others have one.
    """
    if all(picture.label is None for picture in pictures.found):
        return []
    known = {str(name).lower(): int(number) for number, name in config.id2label.items()}
    unknown = all(_number(name, known, config.num_labels) is None for name in pictures.classes)
    if unknown and len(pictures.classes) == config.num_labels:
        known = {name.lower(): number for number, name in enumerate(pictures.classes)}
    return [_class_of(picture, known, config) for picture in pictures.found]


def _class_of(picture: Picture, known: dict[str, int], config: Any) -> int:
    if picture.label is None:
        raise DataError(f"{picture.where} has no label, and others have one; give all images one, or none")
    number = _number(picture.label, known, config.num_labels)
    if number is None:
        names = ", ".join(str(config.id2label[number]) for number in sorted(config.id2label)[:8])
        raise DataError(
            f"{picture.where}: the label {picture.label!r} is none of the model's {config.num_labels}; give a number "
            f"from 0 to {config.num_labels - 1}, or a name: {names}"
        )
    return number


def _number(label: Label, known: dict[str, int], classes: int) -> int | None:
    """The number of a class, from its name or itself."""
    if isinstance(label, str) and label.lower() in known:
        return known[label.lower()]
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    return label if isinstance(label, int) and 0 <= label < classes else None


def _pixels(processor: Any, config: Any, image: Image, where: str) -> Tensor:
    """What the processor makes of an image, [1, channels, height, width].

    Raises:
        ModelError: the processor does not take it, or makes it another size than the model takes.
    """
    try:
        options = _as_given(processor, config.num_channels)
        found: Tensor = processor(image, return_tensors="pt", **options)["pixel_values"]
    except Exception as error:  # its config can hold anything, and what reads it raises what it likes
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the image processor does not take {where} ({first_line(error)})") from error
    wanted = (1, config.num_channels, *_size(config))
    if found.shape != wanted and (found.shape[:2] != wanted[:2] or _takes_one_size(config)):
        raise ModelError(
            f"the image processor makes {' × '.join(map(str, found.shape[1:]))} numbers of {where}, and the model "
            f"takes {' × '.join(map(str, wanted[1:]))}; set size, do_resize and crop_size in preprocessor_config.json"
        )
    return found


def _as_given(processor: Any, channels: int) -> dict[str, Any]:
    """Grey images stay grey: processors that turn all images into colours are told not to."""
    return {"do_convert_rgb": False} if channels == 1 and getattr(processor, "do_convert_rgb", None) else {}


def _takes_one_size(config: Any) -> bool:
    """Whether a model adapts its positions to other sizes only where it is asked to, by an argument."""
    import inspect

    from transformers import AutoModelForImageClassification

    found = AutoModelForImageClassification._model_mapping[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    return "interpolate_pos_encoding" in inspect.signature(model_class.forward).parameters


def _size(config: Any) -> tuple[int, int]:
    """Height and width of the model's images."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _mode(config: Any) -> str:
    if config.num_channels not in MODES:
        raise ModelError(f"the model takes images of {config.num_channels} channels; 1 (grey) and 3 (colours) work")
    return MODES[config.num_channels]


def _made(size: int, mode: str) -> Image:
    """An image of blots of several sizes, the same on every machine."""
    import numpy
    from PIL import Image

    generator = numpy.random.default_rng(0)
    total = numpy.zeros((size, size, 3))
    for scale in (2, 8, 32):
        blots = generator.uniform(0, 255 / 3, (scale, scale, 3)).astype("uint8")
        total += numpy.asarray(Image.fromarray(blots).resize((size, size), Image.Resampling.BILINEAR))
    return Image.fromarray(total.astype("uint8")).convert(mode)
