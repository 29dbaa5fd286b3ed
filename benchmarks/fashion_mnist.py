"""Write Fashion-MNIST as tables: FOLDER/train.parquet and FOLDER/test.parquet.

    python benchmarks/fashion_mnist.py FOLDER

The images are those of Debian's package `dataset-fashion-mnist`.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet


def table(pixels: Path, labels: Path) -> pyarrow.Table:
    """A row for each image, as PNG. The files have headers of 16 and 8 bytes before their uint8 numbers."""
    images = np.frombuffer(gzip.decompress(pixels.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    return pyarrow.table({"image": [_png(image) for image in images], "label": classes.astype(np.int64)})


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("train", "train"), ("t10k", "test")):
        files = (options.source / f"{part}-{each}-ubyte.gz" for each in ("images-idx3", "labels-idx1"))
        parquet.write_table(table(*files), options.folder / f"{name}.parquet")


if __name__ == "__main__":
    main()
