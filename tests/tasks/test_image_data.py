"""Where images come from, and what is wrong with them."""

import gzip
import io
import random
import struct
from pathlib import Path

import numpy
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from gblm_compress import tasks
from gblm_compress.errors import DataError
from gblm_compress.tasks import image_classification as images


def picture(value: int, size: int = 4, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (size, size), value if mode == "L" else (value,) * 3)


def png(value: int) -> bytes:
    content = io.BytesIO()
    picture(value).save(content, "png")
    return content.getvalue()


def idx(path: Path, numbers: numpy.ndarray) -> None:
    """The format of MNIST: two zero bytes, 8 for bytes, how many dimensions, their sizes, the numbers."""
    content = struct.pack(f">4B{numbers.ndim}I", 0, 0, 8, numbers.ndim, *numbers.shape) + numbers.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of three images, one in capitals and one a level deeper."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name / "deep").mkdir(parents=True)
        for value, place in enumerate(("a.png", "b.PNG", "deep/c.bmp")):
            picture(10 * number + value).save(tmp_path / "data" / name / place)
    (tmp_path / "data" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "empty").mkdir()
    return tmp_path / "data"


def values(found: images.Pictures, mode: str = "L") -> list[tuple[int, images.Label]]:
    return [(one.read(mode).getpixel((0, 0)), one.label) for one in found.found]


def test_a_folder_has_a_class_for_each_sub_folder(folder) -> None:
    found = images.read(str(folder), "evaluation", None, 0)
    assert found.classes == ("cat", "dog")
    assert values(found) == [(0, "cat"), (1, "cat"), (2, "cat"), (10, "dog"), (11, "dog"), (12, "dog")]
    chosen = random.Random(5).sample(range(6), 4)
    drawn = images.read(str(folder), "calibration", 4, 5)
    assert values(drawn) == [values(found)[index] for index in chosen] and drawn.classes == found.classes
    assert tasks.data_files(str(folder)) == [folder] and tasks.is_here(str(folder))


def test_a_folder_without_classes_has_no_labels(folder) -> None:
    assert values(images.read(str(folder / "cat" / "deep"), "calibration", None, 0)) == [(2, None)]


def test_parts_of_a_folder(tmp_path, folder) -> None:
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "train")
    assert len(images.read(str(tmp_path / "both"), "calibration", None, 0).found) == 6
    with pytest.raises(DataError, match="has no part for evaluation: no folder val or validation"):
        images.read(str(tmp_path / "both"), "evaluation", None, 0)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix) -> None:
    pixels = numpy.arange(2 * 3 * 5, dtype=numpy.uint8).reshape(2, 3, 5)
    idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels)
    idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", numpy.array([7, 3], dtype=numpy.uint8))
    found = images.read(str(tmp_path), "evaluation", None, 0).found
    assert [one.label for one in found] == [7, 3]
    assert (numpy.stack([numpy.asarray(one.read("L")) for one in found]) == pixels).all()
    assert found[0].read("RGB").size == (5, 3)
    with pytest.raises(DataError, match="no part for calibration: no file train-images-idx3-ubyte"):
        images.read(str(tmp_path), "calibration", None, 0)
    alone = tmp_path / "images-idx3-ubyte"
    idx(alone, pixels)
    assert images.data_files(str(alone)) == [alone]
    assert [one.label for one in images.read(str(alone), "calibration", None, 0).found] == [None, None]
    idx(labels := tmp_path / "labels-idx1-ubyte", numpy.array([1, 0], dtype=numpy.uint8))
    assert images.data_files(str(alone)) == [alone, labels]
    assert [one.label for one in images.read(str(alone), "calibration", None, 0).found] == [1, 0]


def test_a_parquet_file(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    stored = [{"bytes": png(value), "path": None} for value in range(200)]
    parquet.write_table(pyarrow.table({"image": stored, "label": list(range(200))}), path)
    assert values(images.read(str(path), "evaluation", None, 0)) == [(value, value) for value in range(200)]
    for count in (9, 2):  # of four batches, some have none
        chosen = sorted(random.Random(1).sample(range(200), count))
        assert values(images.read(str(path), "calibration", count, 1)) == [(value, value) for value in chosen]
    parquet.write_table(pyarrow.table({"image": stored[:2], "label": [False, True]}), path)
    labels = [one.label for one in images.read(str(path), "evaluation", None, 0).found]
    assert labels == [0, 1] and not any(isinstance(label, bool) for label in labels)
    parquet.write_table(pyarrow.table({"image": [png(3)]}), path)
    assert values(images.read(str(path), "calibration", None, 0)) == [(3, None)]


def test_a_hub_dataset(monkeypatch) -> None:
    class Rows(list):
        def shuffle(self, seed: int, buffer_size: int) -> "Rows":
            return Rows(reversed(self))

    rows = Rows({"image": picture(value), "label": value} for value in range(5))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: rows)
    assert values(images.read("owner/name", "evaluation", None, 0)) == [(value, value) for value in range(5)]
    assert values(images.read("owner/name", "calibration", 2, 0)) == [(4, 4), (3, 3)]
    assert images.data_files("owner/name:config@split") == []


def spoilt(tmp_path: Path, kind: str) -> str:
    """A dataset that is at fault."""
    path = tmp_path / "x"
    path.mkdir()
    if kind == "beside":
        (path / "cat").mkdir()
        picture(0).save(path / "cat" / "a.png")
        picture(0).save(path / "b.png")
    elif kind == "empty part":
        (path / "train" / "cat").mkdir(parents=True)
        (path / "test").mkdir()
        picture(0).save(path / "test" / "a.png")
    elif kind == "no idx":
        (path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x0d\3" + bytes(12))
    elif kind == "cut idx":
        idx(path / "train-images-idx3-ubyte", numpy.zeros((2, 3, 5), numpy.uint8))
        cut = (path / "train-images-idx3-ubyte").read_bytes()[:-1]
        (path / "train-images-idx3-ubyte").write_bytes(cut)
    elif kind == "bomb":
        head = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 5)
        (path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(10_000_000)))
    elif kind == "huge idx":
        (path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *[1 << 16] * 3))
    elif kind == "damaged gz":
        (path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b" + bytes(20))
    elif kind == "labels":
        idx(path / "train-images-idx3-ubyte", numpy.zeros((2, 3, 5), numpy.uint8))
        idx(path / "train-labels-idx1-ubyte", numpy.zeros(3, numpy.uint8))
    elif kind in ("column", "number", "float label", "none"):
        columns = {
            "column": {"img": [png(0)]},
            "number": {"image": [3]},
            "float label": {"image": [png(0)], "label": [0.5]},
            "none": {"image": pyarrow.array([], pyarrow.binary())},
        }[kind]
        parquet.write_table(pyarrow.table(columns), path / "a.parquet")
        return str(path / "a.parquet")
    elif kind == "no parquet":
        (path / "a.parquet").write_bytes(b"PAR1" + bytes(40))
        return str(path / "a.parquet")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "the folder holds no image; give a folder with a sub-folder"),
        ("empty part", "has no image for calibration: the folder 'train' holds none"),
        ("beside", "'b.png' lies beside folders of classes"),
        ("no idx", "is no IDX file of bytes in 3 dimensions"),
        ("cut idx", "says that it holds 2×3×5 numbers, and holds 29"),
        ("bomb", "says that it holds 2×3×5 numbers, and holds more"),
        ("huge idx", "says that it holds 65536×65536×65536 numbers; 1 to 4,294,967,296 can be read"),
        ("damaged gz", "cannot be read"),
        ("labels", "2 images in train-images-idx3-ubyte, 3 labels in train-labels-idx1-ubyte"),
        ("column", "has no column 'image'; it has 'img'"),
        ("number", "row 0: its image is int; the bytes of an image file are needed"),
        ("float label", "row 0: its label is float; a number or a name is needed"),
        ("none", "holds no image"),
        ("no parquet", "cannot be read"),
    ],
)
def test_unusable_datasets_are_data_errors(tmp_path, kind, message) -> None:
    with pytest.raises(DataError, match=message):
        images.read(spoilt(tmp_path, kind), "calibration", None, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("demo", "'demo' is text, and the model takes images"),
        ("c4", "is text"),
        ("./gone", "'./gone' is not there; give a folder with a sub-folder"),
        ("gone.parquet", "no such file"),
        ("words.txt", "is not there"),
    ],
)
def test_what_is_no_dataset_of_images(source, message) -> None:
    with pytest.raises(DataError, match=message):
        images.data_files(source)


def test_what_no_task_can_read_is_refused_in_words_for_all_of_them(tmp_path) -> None:
    """The model is not known yet: a folder without an image may have been meant for one of texts or of images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").touch()
    for path, message in (
        ("empty", "is a folder"),
        ("config.json", "is a file of another kind"),
    ):
        with pytest.raises(DataError) as raised:
            tasks.data_files(str(tmp_path / path))
        said = str(raised.value)
        assert said.startswith(f"dataset {str(tmp_path / path)!r} {message}; for a causal language model give a .txt")
        assert all(task.help in said and task.reads in said for task in tasks.TASKS.values())
    for gone in ("gone.parquet", "./gone.txt", "./gone"):
        with pytest.raises(DataError, match=rf"'{gone}': no such file$"):
            tasks.data_files(gone)


def test_damaged_and_deep_images_are_data_errors(tmp_path) -> None:
    picture(0, 64).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    (tmp_path / "words.jpg").write_text("no image")
    Image.fromarray(numpy.full((4, 4), 1000, numpy.uint16)).save(tmp_path / "deep.png")
    found = images.read(str(tmp_path), "evaluation", None, 0).found
    messages = (
        "cut.png' cannot be read as an image",
        "deep.png' has pixels of mode I;16",
        "words.jpg' cannot be read as an image .of no known format.; remove it",
    )
    for one, message in zip(found, messages, strict=True):
        with pytest.raises(DataError, match=message):
            one.read("RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_all_modes_are_converted(tmp_path, mode) -> None:
    picture(200).convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (one,) = images.read(str(tmp_path), "evaluation", None, 0).found
    assert one.read("RGB").mode == "RGB" and one.read("L").mode == "L"
    if mode != "1":  # black and white: dots that look grey from afar
        assert abs(one.read("RGB").getpixel((1, 1))[0] - 200) <= (5 if mode == "P" else 1)
