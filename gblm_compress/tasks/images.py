"""Images for calibration and evaluation: where they come from.

SRC is a folder with a sub-folder for each class, a folder of images without classes, a `.parquet` file or hub dataset
(`owner/name[:config][@split]`) with columns `image` and `label`, or IDX files, the format of MNIST. Importing this
module loads no torch.
"""

from __future__ import annotations

import gzip
import io
import math
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gblm_compress.errors import DataError, first_line, is_out_of_memory
from gblm_compress.storage.paths import kind_of, local
from gblm_compress.tasks import text

if TYPE_CHECKING:
    from PIL.Image import Image

Label: TypeAlias = "int | str | None"

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PARTS = {"calibration": ("train", "training"), "evaluation": ("val", "validation", "valid", "test")}
"""What the sub-folders of an image folder may be called that hold one part each."""

_IDX = re.compile(r"(?P<part>.*)images[-.]idx3-ubyte(?P<packed>\.gz)?")
_IDX_PARTS = {"calibration": "train-", "evaluation": "t10k-"}
READS = (
    "a folder with a sub-folder of images for each class, a .parquet file or hub dataset with columns 'image' and "
    "'label', or IDX files (…images-idx3-ubyte, also as .gz)"
)
LARGEST_IDX = 1 << 32
"""Bytes of an IDX file, which is in memory as a whole."""
_SHUFFLED = 1_000
"""Images of a hub dataset that are held at once to draw from; its files are read in random order, too."""


@dataclass(frozen=True)
class Picture:
    """An image of a dataset, which is read when it is asked for.

    Attributes:
        where: what to call it in messages.
        label: the number or the name of its class; None where the data has no classes.
    """

    where: str
    label: Label
    _open: Callable[[], Image]

    def read(self, mode: str) -> Image:
        """The image in a mode of Pillow: "L" for grey, "RGB" for colours.

        Raises:
            DataError: it is damaged, no image, or has more than 8 bits a channel.
        """
        from PIL import UnidentifiedImageError

        try:
            image = self._open()
            image.load()
        except Exception as error:  # Pillow and its decoders each raise their own kinds for bad data
            if is_out_of_memory(error):
                raise
            # Pillow names the object that it was given, which says nothing here.
            reason = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
            raise DataError(f"{self.where} cannot be read as an image ({reason}); remove it") from error
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{self.where} has pixels of mode {image.mode}; give images of 8 bits a channel")
        return image.convert(mode)


@dataclass(frozen=True)
class Pictures:
    """The images of a dataset, or some of them.

    Attributes:
        found: the images.
        classes: the names of all classes in the dataset's order, where it has names for them.
    """

    found: Sequence[Picture]
    classes: tuple[str, ...] = ()


def data_files(source: str) -> list[Path]:
    """The file or folder of images that a source names, and the labels that lie beside it; of the hub it asks nothing.

    Raises:
        DataError: there is none, or it is of another kind.
    """
    path = local(source)
    kind = kind_of(path)
    if source in ("demo", "wikitext2", "c4"):
        raise DataError(f"dataset {source!r} is text, and the model takes images; give {READS}")
    if kind == "folder":
        if not _idx_files(path) and next(_images_below(path), None) is None:
            raise DataError(f"dataset {source!r}: the folder holds no image; give {READS}")
        return [path]
    if path.suffix == ".parquet" or _IDX.fullmatch(path.name):
        if kind != "file":
            raise DataError(f"dataset {source!r}: no such file" if kind is None else f"dataset {source!r} is no file")
        labels = _labels_of(path) if path.suffix != ".parquet" else None
        return [path] if labels is None else [path, labels]
    if kind is not None or path.suffix in text.FILES or source.startswith((".", "/", "~")):
        raise DataError(f"dataset {source!r} {text.FOUND[kind]}; give {READS}")
    return []


def read(source: str, role: text.Role, count: int | None, seed: int) -> Pictures:
    """Images of a dataset: `count` drawn at random without putting back, or all there are in the dataset's order.

    Args:
        role: picks the part where a source has several.
        count: how many at most.
        seed: of `random.Random`.

    Raises:
        DataError: the source does not exist, cannot be read, or has no image.
    """
    paths = data_files(source)
    if not paths:
        return Pictures(list(_of_hub(source, role, count, seed)))
    path = paths[0]
    if path.is_dir() and not _idx_files(path):
        found, classes = _of_folder(path, role)
    elif path.suffix == ".parquet":
        return Pictures(_of_parquet(path, source, count, seed))
    else:
        found, classes = _of_idx(path, source, role), ()
    return Pictures([found[index] for index in _chosen(len(found), count, seed)], classes)


def _chosen(available: int, count: int | None, seed: int) -> Sequence[int]:
    if count is None or count >= available:
        return range(available)
    return random.Random(seed).sample(range(available), count)


def _images_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _of_folder(folder: Path, role: text.Role) -> tuple[list[Picture], tuple[str, ...]]:
    """All images of a folder. The classes are its sub-folders that hold images; one of `PARTS` is entered first."""
    part = next((folder / name for name in PARTS[role] if (folder / name).is_dir()), folder)
    if part is folder and any((folder / name).is_dir() for names in PARTS.values() for name in names):
        raise DataError(f"dataset {str(folder)!r} has no part for {role}: no folder {' or '.join(PARTS[role])}")
    folders = sorted(path for path in part.iterdir() if path.is_dir() and next(_images_below(path), None))
    loose = sorted(path for path in part.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if folders and loose:
        raise DataError(f"dataset {str(folder)!r}: {loose[0].name!r} lies beside folders of classes; put it into one")
    found = [_of_file(path, below.name) for below in folders for path in sorted(_images_below(below))]
    found += [_of_file(path, None) for path in loose]
    if not found:
        raise DataError(f"dataset {str(folder)!r} has no image for {role}: the folder {part.name!r} holds none")
    return found, tuple(below.name for below in folders)


def _of_file(path: Path, label: Label) -> Picture:
    from PIL import Image

    return Picture(f"image {str(path)!r}", label, lambda: Image.open(io.BytesIO(path.read_bytes())))


def _of_parquet(path: Path, source: str, count: int | None, seed: int) -> list[Picture]:
    """The chosen rows, in their order in the file."""
    from pyarrow import parquet

    found = []
    with text.reading(source), parquet.ParquetFile(path) as file:
        names = [name for name in ("image", "label") if name in file.schema_arrow.names]
        if "image" not in names:
            has = ", ".join(map(repr, file.schema_arrow.names[:8]))
            raise DataError(f"dataset {source!r} has no column 'image'; it has {has}")
        chosen, first = set(_chosen(file.metadata.num_rows, count, seed)), 0
        for batch in file.iter_batches(batch_size=64, columns=names):
            if numbers := [row for row in range(len(batch)) if first + row in chosen]:  # none has no type
                rows = zip(batch.take(numbers).to_pylist(), numbers, strict=True)
                found += [_of_row(row, f"dataset {source!r}, row {first + number}") for row, number in rows]
            first += len(batch)
    if not found:
        raise DataError(f"dataset {source!r} holds no image")
    return found


def _of_hub(source: str, role: text.Role, count: int | None, seed: int) -> Iterator[Picture]:
    rows = text.hub_rows(source, role)
    with text.reading(source):
        if count is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLED)
        for number, row in enumerate(islice(rows, count)):
            yield _of_row(row, f"dataset {source!r}, row {number}")


def _of_row(row: dict[str, Any], where: str) -> Picture:
    """An image in a column: its file's bytes, a mapping with them, as `datasets` writes it, or an image of Pillow."""
    from PIL import Image

    if "image" not in row:
        raise DataError(f"{where} has no column 'image'; it has {', '.join(map(repr, islice(row, 8)))}")
    stored, label = row["image"], row.get("label")
    content = stored.get("bytes") if isinstance(stored, dict) else stored
    if isinstance(label, bool) or (isinstance(label, float) and label.is_integer()):
        label = int(label)
    if not (label is None or isinstance(label, int | str)):
        raise DataError(f"{where}: its label is {type(label).__name__}; a number or a name is needed")
    if isinstance(content, Image.Image):
        return Picture(where, label, lambda: content)
    if not isinstance(content, bytes):
        raise DataError(f"{where}: its image is {type(content).__name__}; the bytes of an image file are needed")
    return Picture(where, label, lambda: Image.open(io.BytesIO(content)))


def _idx_files(folder: Path) -> list[Path]:
    """The IDX files of images in a folder."""
    return sorted(path for path in folder.iterdir() if _IDX.fullmatch(path.name))


def _labels_of(path: Path) -> Path | None:
    """The IDX file of labels beside one of images, packed or not."""
    names = [path.name.replace("images", "labels").replace("idx3", "idx1")]
    names += [names[0].removesuffix(".gz") if names[0].endswith(".gz") else f"{names[0]}.gz"]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def _of_idx(path: Path, source: str, role: text.Role) -> list[Picture]:
    """All images of an IDX file, or of that one of a folder's that is for the role; with labels where they lie beside.

    The format: two zero bytes, the type of the numbers (8: bytes), how many dimensions, their sizes as 32-bit numbers,
    the high byte first, and the numbers row by row.
    """
    from PIL import Image

    if path.is_dir():
        files = _idx_files(path)
        path = next((file for file in files if file.name.startswith(_IDX_PARTS[role])), path)
        if path.is_dir():
            raise DataError(f"dataset {source!r} has no part for {role}: no file {_IDX_PARTS[role]}images-idx3-ubyte")
    (count, height, width), pixels = _idx(path, source, dimensions=3)
    beside = _labels_of(path)
    labels: Sequence[Label] = [None] * count
    if beside is not None:
        (labelled,), values = _idx(beside, source, dimensions=1)
        if labelled != count:
            raise DataError(f"dataset {source!r}: {count} images in {path.name}, {labelled} labels in {beside.name}")
        labels = list(values)
    size = height * width

    def image(number: int) -> Picture:
        at = slice(number * size, (number + 1) * size)
        where = f"image {number} of {str(path)!r}"
        return Picture(where, labels[number], lambda: Image.frombytes("L", (width, height), pixels[at]))

    return [image(number) for number in range(count)]


def _idx(path: Path, source: str, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    """The sizes and the numbers of an IDX file of bytes."""
    where = f"dataset {source!r}: {path.name}"
    with text.reading(source), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        head = file.read(4 + 4 * dimensions)
        if head[:4] != bytes([0, 0, 8, dimensions]) or len(head) < 4 + 4 * dimensions:
            raise DataError(f"{where} is no IDX file of bytes in {dimensions} dimensions")
        sizes = struct.unpack(f">{dimensions}I", head[4:])
        numbers, shape = math.prod(sizes), "×".join(map(str, sizes))
        if not 0 < numbers <= LARGEST_IDX:
            raise DataError(f"{where} says that it holds {shape} numbers; 1 to {LARGEST_IDX:,} can be read")
        content = file.read(numbers + 1)
    if len(content) != numbers:
        held = "more" if len(content) > numbers else f"{len(content):,}"
        raise DataError(f"{where} says that it holds {shape} numbers, and holds {held}; give whole files")
    return sizes, content
