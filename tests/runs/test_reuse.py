"""A stage is done again where what it reads is not what it was."""

from pathlib import Path

import numpy
from PIL import Image

from gblm_compress.runs.reuse import data_hash
from tests.tasks.test_image_data import idx


def test_an_image_in_another_class_is_other_data(tmp_path: Path) -> None:
    for number, name in enumerate(("cat/a", "cat/b", "dog/c")):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    before = data_hash(str(tmp_path / "images"))
    assert data_hash(str(tmp_path / "images")) == before
    (tmp_path / "images" / "cat" / "b.png").rename(tmp_path / "images" / "dog" / "b.png")
    assert data_hash(str(tmp_path / "images")) != before


def test_a_folder_that_moved_is_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "one" / "texts").mkdir(parents=True)
    (tmp_path / "one" / "texts" / "a.txt").write_text("text")
    before = data_hash(str(tmp_path / "one" / "texts" / "a.txt"))
    (tmp_path / "one").rename(tmp_path / "other")
    assert data_hash(str(tmp_path / "other" / "texts" / "a.txt")) == before


def test_labels_beside_images_are_data(tmp_path: Path) -> None:
    idx(images := tmp_path / "t10k-images-idx3-ubyte", numpy.zeros((2, 3, 3), dtype=numpy.uint8))
    found = {data_hash(str(images))}
    for labels in ([0, 1], [1, 0]):
        idx(tmp_path / "t10k-labels-idx1-ubyte", numpy.array(labels, dtype=numpy.uint8))
        found.add(data_hash(str(images)))
    assert len(found) == 3
