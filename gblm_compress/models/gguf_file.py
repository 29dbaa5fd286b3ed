"""Whether a GGUF file's header stays within the file: its readers trust every count, and loop over what is not there.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian: magic, version, numbers of tensors and of keys; for each
key a name, a type and a value; for each tensor a name, its dimensions, a type and an offset.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from gblm_compress.errors import ModelError

_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays within arrays
_MOST_DIMENSIONS = 4
_NAME_END = 64  # bytes of a name that are looked at
_MOST_STEPS = 10_000_000  # keys, tensors and items of arrays; large vocabularies need one or two million


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
        self._data, self._at, self._steps = data, 0, 0

    def check(self) -> None:
        magic, version, tensors, keys = self._read("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r} and version {version}")
        sizes: dict[str, int] = {}
        for _ in self._count(keys):
            key = self._string()
            (kind,) = self._read("<I")
            if not key.endswith((b".block_count", b".expert_count")):
                self._skip_value(kind, _DEEPEST)
            elif kind in _INTEGERS:
                sizes[key.decode(errors="replace")] = self._read(_INTEGERS[kind])[0]
            else:
                raise ValueError(f"{key.decode(errors='replace')} is no number")
        widest = tensors
        for _ in self._count(tensors):
            self._string()
            (dimensions,) = self._read("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            widest = max((widest, *self._read(f"<{dimensions}Q")))
            self._skip(12)
        for name, size in sizes.items():  # readers build a model of that size before they read a tensor
            if size > (tensors if name.endswith(".block_count") else widest):
                raise ValueError(f"{name} is {size}, and it holds {tensors} tensors")

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth:
            item, count = self._read("<IQ")
            if item in _SIZES:
                self._skip(len(self._count(count, _SIZES[item])) * _SIZES[item])
            else:
                for _ in self._count(count):
                    self._skip_value(item, depth - 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"a key has a value of unknown type {kind}")

    def _count(self, count: int, size: int = 8) -> range:
        """The walk over what takes `size` bytes at least each. Readers walk item by item, through numbers too, and a
        sparse file holds any number of them for nothing.
        """
        if size * count > len(self._data) - self._at:
            raise ValueError("its header leads beyond its end")
        self._steps += count
        if self._steps > _MOST_STEPS:
            raise ValueError(f"its header counts {self._steps:,} keys, tensors and items; {_MOST_STEPS:,} are read")
        return range(count)

    def _string(self) -> bytes:
        """Moves on past a text; gives its end."""
        (size,) = self._read("<Q")
        self._skip(size)
        return self._data[self._at - min(size, _NAME_END) : self._at]

    def _read(self, layout: str) -> tuple[Any, ...]:
        begin = self._at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, begin)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("its header leads beyond its end")
