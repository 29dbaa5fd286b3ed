"""Our own JSON files: written whole or not at all, read within limits, and sealed if they are trusted."""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

from gblm_compress.errors import OutputError


class Result:
    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(cast(Any, self))


SEAL = "sha256"  # key of a record: the hash of its other keys
_LARGEST_JSON = 256 << 20


def read_json(path: Path, kind: type = dict, *, unique: bool = False) -> Any:
    """The JSON object, or array if `kind` is list, in a regular file; OSError or ValueError if there is none.

    `unique` refuses an object with a repeated key: other readers may take another of its values.
    """
    if not path.is_file():  # never wait for a pipe or read a device
        raise FileNotFoundError(f"{path.name} is missing or not a regular file")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"it is larger than {_LARGEST_JSON >> 20} MiB")
    try:
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, kind):
        raise ValueError(f"it holds a {type(content).__name__}, not {'an object' if kind is dict else 'an array'}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a key twice")
    return content


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whatever happens to process or machine; a text as UTF-8."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            to_disk(file)
        rename_durably(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a record of our own, durably, with a hash of its content: see `read_sealed`."""
    write_file(path, json.dumps({SEAL: hash_of(content), **content}, indent=2) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a record that `write_sealed` wrote; ValueError if any value has changed."""
    content = read_json(path)
    if content.pop(SEAL, None) != hash_of(content):
        raise ValueError("its content does not match its hash")
    return content


def hash_of(content: Any) -> str:
    """SHA-256 of plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_json(content: Any) -> str:
    """JSON that every reader takes: a number that is not finite becomes null."""
    return json.dumps(_finite(content), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def rename_durably(source: Path, target: Path) -> None:
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
