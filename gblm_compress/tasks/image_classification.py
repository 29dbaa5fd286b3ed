"""Classification of images, and their sources: folders, tables and hub datasets."""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from gblm_compress.errors import DataError, ModelError, first_line, is_out_of_memory, translated
from gblm_compress.settings.fields import SELF
from gblm_compress.tasks import text
from gblm_compress.tasks.classification import Classes, class_of, names_of
from gblm_compress.tasks.task import IMAGE_PROCESSOR, Sample, Samples, with_draws

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Label: TypeAlias = "int | str | None"

MODES = {1: "L", 3: "RGB"}  # of Pillow, by the model's channels
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow may run a program for others, such as EPS
PARTS = {"calibration": ("train", "training"), "evaluation": ("val", "validation", "valid", "test")}  # sub-folders
READS = (
    "a folder with a sub-folder of images for each class, or a .parquet file or hub dataset with columns 'image' and "
    "'label'"
)
_SHUFFLED = 1_000  # images of a hub dataset in the buffer for shuffling; its files are shuffled too


class ImageClassification(Classes):
    """Samples are single images from the model's image processor; labels are read if the data has them."""

    help = "a model that classifies images"
    auto_class = "AutoModelForImageClassification"
    processor = IMAGE_PROCESSOR
    varying_axes = 1
    sample = "image"
    reads = READS
    accuracies: ClassVar[Mapping[str, int]] = {"top1_accuracy": 1, "top5_accuracy": 5}

    def check_processor(self, processor: Any) -> None:
        if "pixel_values" not in processor.model_input_names:
            raise ModelError(f"its image processor makes {', '.join(processor.model_input_names)}, not pixel_values")

    def data_files(self, dataset: str) -> list[Path]:
        return data_files(dataset)

    def calibration(self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int) -> Samples:
        pictures, classes = read(dataset, "calibration", samples, seed)
        if len(pictures) < samples:
            raise DataError(
                f"dataset {dataset!r} has {len(pictures)} images, but {samples} samples are asked for; give fewer"
            )
        return with_draws(list(Preprocessed(processor, config, pictures, classes)), seed)

    def training(self, processor: Any, config: Any, dataset: str, length: int, tokens: int) -> Sequence[Sample]:
        return Preprocessed(processor, config, *read(dataset, "calibration", tokens // length, seed=0))

    def tokens_of(self, config: Any, length: int) -> int:
        """The patches of an image; of 16 × 16 pixels if the config does not say."""
        patch = getattr(config, "patch_size", None)
        return math.prod(size // (patch if isinstance(patch, int) else 16) or 1 for size in _size(config))

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Sequence[Sample]:
        """With a limit, images are drawn at random, because folders are sorted by class."""
        return Preprocessed(processor, config, *read(dataset, "evaluation", limit, seed=0))

    def probe(self, processor: Any, config: Any) -> Sample:
        """A synthetic image of large and small blots: no photograph is on every machine."""
        return {"pixel_values": _pixels(processor, config, _made(256, _mode(config)), "a synthetic image")}

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, config.num_channels, *_size(config), generator=generator)}

    def example(self, config: Any) -> Sample:
        return self.timed(config, 2, 0, seed=0)


@dataclass(frozen=True)
class Picture:
    """An image of a dataset, read on demand."""

    where: str  # its name in messages
    label: Label  # the number or the name of its class; None if the data has no classes
    _open: Callable[[], Image]

    def read(self, mode: str) -> Image:
        from PIL import UnidentifiedImageError

        try:
            image = self._open()
            image.load()
        except Exception as error:  # Pillow and its decoders each raise their own kinds for bad data
            if is_out_of_memory(error):
                raise
            # Pillow's message names a buffer in memory, which tells the user nothing.
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)
            raise DataError(f"{self.where} cannot be read as an image ({reason}); remove it") from error
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{self.where} has pixels of mode {image.mode}; give images with 8 bits per channel")
        return image.convert(mode)


class Preprocessed(Sequence[Sample]):
    """Samples that are read and processed at each access; the labels are checked once, at the start."""

    def __init__(self, processor: Any, config: Any, pictures: Sequence[Picture], classes: tuple[str, ...]) -> None:
        self._processor, self._config, self._pictures = processor, config, pictures
        self._mode = _mode(config)
        self._labels = labels_of(pictures, classes, config)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        import torch

        picture = self._pictures[index]
        pixels = _pixels(self._processor, self._config, picture.read(self._mode), picture.where)
        label = {"labels": torch.tensor([self._labels[index]])} if self._labels else {}
        return {"pixel_values": pixels, **label}


def labels_of(pictures: Sequence[Picture], classes: tuple[str, ...], config: Any) -> list[int]:
    """The class numbers of all images; empty if the data has no classes.

    Model and data may have equally many classes and share no name. Then the folders in alphabetical order are the
    classes, as in `torchvision` and ImageNet.
    """
    if all(picture.label is None for picture in pictures):
        return []
    names = names_of(config)
    numbers = {str(number) for number in range(config.num_labels)}
    if len(classes) == config.num_labels and not any(name.lower() in names or name in numbers for name in classes):
        names = {name.lower(): number for number, name in enumerate(classes)}
    return [class_of(picture.label, picture.where, config, names) for picture in pictures]


def _pixels(processor: Any, config: Any, image: Image, where: str) -> Tensor:
    """The processed image [1, channels, height, width]."""
    # Grey images stay grey: a processor must not turn them into RGB.
    to_colours = config.num_channels == 1 and getattr(processor, "do_convert_rgb", None)
    options = {"do_convert_rgb": False} if to_colours else {}
    with translated(lambda said: ModelError(f"the image processor fails on {where} ({said})")):
        found: Tensor = processor(image, return_tensors="pt", **options)["pixel_values"]
    wanted = (1, config.num_channels, *_size(config))
    if found.shape != wanted and (found.shape[:2] != wanted[:2] or _takes_one_size(config)):
        raise ModelError(
            f"the image processor makes {' × '.join(map(str, found.shape[1:]))} numbers of {where}, but the model "
            f"takes {' × '.join(map(str, wanted[1:]))}; set size, do_resize and crop_size in preprocessor_config.json"
        )
    return found


def _takes_one_size(config: Any) -> bool:
    """Whether a model takes images of other sizes only with the argument `interpolate_pos_encoding`."""
    import inspect

    from transformers import AutoModelForImageClassification

    found = AutoModelForImageClassification._model_mapping[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    return "interpolate_pos_encoding" in inspect.signature(model_class.forward).parameters


def _size(config: Any) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _mode(config: Any) -> str:
    if config.num_channels not in MODES:
        raise ModelError(f"the model takes images with {config.num_channels} channels, not 1 (grey) or 3 (RGB)")
    return MODES[config.num_channels]


def _made(size: int, mode: str) -> Image:
    import numpy
    from PIL import Image

    generator = numpy.random.default_rng(0)
    total = numpy.zeros((size, size, 3))
    for scale in (2, 8, 32):
        blots = generator.uniform(0, 255 / 3, (scale, scale, 3)).astype("uint8")
        total += numpy.asarray(Image.fromarray(blots).resize((size, size), Image.Resampling.BILINEAR))
    return Image.fromarray(total.astype("uint8")).convert(mode)


def data_files(source: str) -> list[Path]:
    """The local file or folder of images of a source; empty for the hub."""
    path = Path(os.path.expanduser(source))
    if source in (*text.NAMED, SELF):
        raise DataError(f"dataset {source!r} is text, but the model takes images; give {READS}")
    if os.path.isdir(path):
        if next(_images_below(path), None) is None:
            raise DataError(f"dataset {source!r}: the folder holds no image; give {READS}")
        return [path]
    if path.suffix == ".parquet":
        text.check_file(path, source)
        return [path]
    if os.path.exists(path) or path.suffix in text.FILES or source.startswith((".", "/", "~")):
        raise DataError(f"dataset {source!r} {text.found(path)}; give {READS}")
    return []


def read(source: str, role: text.Role, count: int | None, seed: int) -> tuple[list[Picture], tuple[str, ...]]:
    """At most `count` images, drawn at random; or all in order. `role` picks the part, if the dataset has parts.

    Also the names of the classes in order, if they have names.
    """
    path = next(iter(data_files(source)), None)
    if path is None or path.is_file():
        return _of_rows(path, source, role, count, seed), ()
    found, classes = _of_folder(path, role)
    return [found[index] for index in _chosen(len(found), count, seed)], classes


def _chosen(available: int, count: int | None, seed: int) -> Sequence[int]:
    if count is None or count >= available:
        return range(available)
    return random.Random(seed).sample(range(available), count)


def _images_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _of_folder(folder: Path, role: text.Role) -> tuple[list[Picture], tuple[str, ...]]:
    """All images of a folder. Its sub-folders with images are the classes. A folder of `PARTS` is entered first."""
    part = next((folder / name for name in PARTS[role] if (folder / name).is_dir()), folder)
    if part is folder and any((folder / name).is_dir() for names in PARTS.values() for name in names):
        raise DataError(f"dataset {str(folder)!r} has no part for {role}: no folder {' or '.join(PARTS[role])}")
    folders = sorted(path for path in part.iterdir() if path.is_dir() and next(_images_below(path), None))
    loose = sorted(path for path in part.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if folders and loose:
        raise DataError(f"dataset {str(folder)!r}: {loose[0].name!r} lies beside class folders; move it into one")
    found: list[tuple[Path, Label]] = [(path, below.name) for below in folders for path in sorted(_images_below(below))]
    found = found or [(path, None) for path in loose]
    if not found:
        raise DataError(f"dataset {str(folder)!r} has no image for {role}: the folder {part.name!r} holds none")

    pictures = [Picture(f"image {str(path)!r}", label, partial(_decoded, path)) for path, label in found]
    return pictures, tuple(below.name for below in folders)


def _of_rows(path: Path | None, source: str, role: text.Role, count: int | None, seed: int) -> list[Picture]:
    from PIL import EpsImagePlugin
    from pyarrow import parquet

    EpsImagePlugin.gs_binary = False  # `datasets` opens images of every format
    with text.reading(source):
        if path is not None:
            chosen = set(_chosen(parquet.read_metadata(path).num_rows, count, seed))
            numbered = enumerate(row for _, row in text.records(source, role, ("image", "label")))
            rows = [(number, row) for number, row in numbered if number in chosen]
        else:
            hub = text.hub_rows(source, role)
            hub = hub if count is None else hub.shuffle(seed=seed, buffer_size=_SHUFFLED)
            rows = list(enumerate(islice(hub, count)))
    if not rows:
        raise DataError(f"dataset {source!r} holds no image")
    return [_of_row(row, f"dataset {source!r}, row {number}") for number, row in rows]


def _of_row(row: Mapping[str, Any], where: str) -> Picture:
    """An image in a column: the bytes of a file, a mapping with them (as from `datasets`), or a Pillow image."""
    from PIL import Image

    if "image" not in row:
        raise DataError(f"{where} has no column 'image'; it has {', '.join(map(repr, islice(row, 8)))}")
    stored, label = row["image"], row.get("label")
    content = stored.get("bytes") if isinstance(stored, dict) else stored
    if isinstance(label, bool) or (isinstance(label, float) and label.is_integer()):
        label = int(label)
    if not (label is None or isinstance(label, int | str)):
        raise DataError(f"{where}: its label is {type(label).__name__}; give a whole number or a name")
    if isinstance(content, Image.Image):
        return Picture(where, label, lambda: content)
    if not isinstance(content, bytes):
        raise DataError(f"{where}: its image is {type(content).__name__}; give the bytes of an image file")
    return Picture(where, label, partial(_decoded, content))


def _decoded(stored: Path | bytes) -> Image:
    from PIL import Image

    content = stored.read_bytes() if isinstance(stored, Path) else stored
    return Image.open(io.BytesIO(content), formats=FORMATS)
