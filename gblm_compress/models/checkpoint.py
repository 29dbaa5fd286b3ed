"""A model's weights as they lie on disk: safetensors files, read one tensor at a time and rewritten in one stream.

Nothing here holds more than one tensor. Files are mapped only while a tensor is read, so that the pages of a large
checkpoint do not pile up in the resident memory of the process.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.models import files
from gblm_compress.storage import records

DIGEST = "sha256"
"""The key of a file's metadata under which `save_durably` states the hash of its tensors."""

_CHUNK = 16 << 20


class Checkpoint:
    """The safetensors of a Hugging Face folder, addressed by the names that the model gives its tensors.

    Checkpoints of a bare backbone (GPT-2's, say) lack the prefix of the whole model; it is added.

    Args:
        folder: the Hugging Face folder.
        names: of the model's parameters and buffers.
        prefix: the model's `base_model_prefix`.

    Raises:
        ModelError: a file is damaged or missing.
    """

    def __init__(self, folder: Path, names: Iterable[str], prefix: str) -> None:
        self.files = files.weight_files(folder)
        self._index = files.index_file(folder)
        self._known, self._prefix = set(names), prefix
        self._where: dict[str, tuple[Path, str]] = {}
        for path in self.files:
            for key in keys(path):
                self._where[self._model_name(key)] = (path, key)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """The tensor of that name in the checkpoint's dtype, mapped to its file where possible.

        Raises:
            ModelError: there is none, or its file is damaged.
        """
        if name not in self._where:
            raise ModelError(
                f"{name}: no such tensor in {self.files[0].parent}; the checkpoint is incomplete, or transformers "
                "converts it while loading, which block by block is not supported"
            )
        return read_tensor(*self._where[name])

    def rewrite(self, folder: Path, changed: Callable[[str], Tensor | None]) -> None:
        """Write the checkpoint to `folder`, file by file under the same names, with some tensors changed.

        Args:
            changed: gives the new tensor of a name, of the same shape and dtype, or None where it stays.
        """
        weight_map = {}
        for path in self.files:
            header, metadata, data = files.read_header(path)
            with path.open("rb") as source, (folder / path.name).open("wb") as target:
                entries = {self._model_name(key): entry for key, entry in header.items()}
                text = json.dumps(
                    {"__metadata__": metadata | {"format": "pt"}, **entries}, separators=(",", ":")
                ).encode()
                text += b" " * (-len(text) % 8)
                target.write(len(text).to_bytes(8, "little") + text)
                for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                    begin, end = entry["data_offsets"]
                    weight_map[name] = path.name
                    tensor = changed(name)
                    if tensor is None:
                        source.seek(data + begin)
                        _copy(source, target, end - begin)
                    else:
                        assert tensor.nbytes == end - begin, "a changed tensor keeps its shape and dtype"
                        target.write(_bytes(tensor))
                records.to_disk(target)
        if self._index is not None:
            content = records.read_json(self._index) | {"weight_map": weight_map}
            (folder / self._index.name).write_text(json.dumps(content, indent=2, sort_keys=True))

    def _model_name(self, key: str) -> str:
        with_prefix, without = f"{self._prefix}.{key}", key.removeprefix(f"{self._prefix}.")
        return next((name for name in (key, with_prefix, without) if name in self._known), key)


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged safetensors file ({error})") from error


def keys(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged safetensors file ({error})") from error


def save_durably(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is either whole or absent, whatever happens to process or machine.

    It states the hash of its content, so that `is_intact` can tell later.
    """
    temporary = path.with_name(f".{path.name}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={DIGEST: _digest(plain)})
    with temporary.open("rb") as file:
        records.to_disk(file)
    records.rename_durably(temporary, path)


def is_intact(path: Path) -> bool:
    """Whether a file that `save_durably` wrote still holds what it wrote, to the last bit."""
    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get(DIGEST)
            return stated == _digest({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size:
        chunk = source.read(min(size, _CHUNK))
        target.write(chunk)
        size -= len(chunk)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
