"""Whether a GGUF file's header stays within the file: its readers trust every count, and loop over what is not there.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian: magic, version, numbers of tensors and of keys; for each
key a name, a type and a value; for each tensor a name, its dimensions, a type and an offset.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from gblm_compress.errors import ModelError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays within arrays
_MOST_DIMENSIONS = 4


def check(path: Path) -> None:
    """Walk through the header.

    Raises:
        ModelError: the file is no GGUF file of version 2 or 3, or is truncated or damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
        raise ModelError(f"model {str(path)!r}: cannot be read as GGUF ({error})") from error


class _Header:
    """A place in the header that moves on with what is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def check(self) -> None:
        magic, version, tensors, keys = self._read("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r} and version {version}")
        for _ in range(keys):
            self._skip_string()
            self._skip_value(self._read("<I")[0], _DEEPEST)
        for _ in range(tensors):
            self._skip_string()
            (dimensions,) = self._read("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            self._skip(8 * dimensions + 12)

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._skip_string()
        elif kind == _ARRAY and depth:
            item, count = self._read("<IQ")
            if item in _SIZES:
                self._skip(count * _SIZES[item])
            else:
                for _ in range(count):  # each takes 8 bytes at least: a count that is too large ends the file first
                    self._skip_value(item, depth - 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"a key has a value of unknown type {kind}")

    def _skip_string(self) -> None:
        self._skip(self._read("<Q")[0])

    def _read(self, layout: str) -> tuple[Any, ...]:
        begin = self._at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, begin)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("its header leads beyond its end")
