"""A model's weights as they lie on disk: safetensors files, read one tensor at a time and rewritten in one stream.

Nothing here holds more than one tensor. Files are mapped only while a tensor is read, so that the pages of a large
checkpoint do not pile up in the resident memory of the process.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gblm_compress import artifact
from gblm_compress.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
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
        known = set(names)
        index = folder / INDEX
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = [SINGLE] if (folder / SINGLE).exists() else sorted(p.name for p in folder.glob("*.safetensors"))
        self.files = [folder / name for name in files]
        self._known, self._prefix = known, prefix
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
            with path.open("rb") as source, (folder / path.name).open("wb") as target:
                length = int.from_bytes(source.read(8), "little")
                header: dict[str, Any] = json.loads(source.read(length))
                metadata = header.pop("__metadata__", {}) | {"format": "pt"}
                entries = {self._model_name(key): entry for key, entry in header.items()}
                text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
                text += b" " * (-len(text) % 8)
                target.write(len(text).to_bytes(8, "little") + text)
                for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                    begin, end = entry["data_offsets"]
                    weight_map[name] = path.name
                    tensor = changed(name)
                    if tensor is None:
                        source.seek(8 + length + begin)
                        _copy(source, target, end - begin)
                    else:
                        assert tensor.nbytes == end - begin, "a changed tensor keeps its shape and dtype"
                        target.write(_bytes(tensor))
                artifact.to_disk(target)
        if len(self.files) > 1:
            index = self.files[0].parent / INDEX
            content = json.loads(index.read_text()) if index.exists() else {"metadata": {}}
            (folder / INDEX).write_text(json.dumps(content | {"weight_map": weight_map}, indent=2, sort_keys=True))

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
    """Write a safetensors file that is either whole or absent, whatever happens to process or machine."""
    temporary = path.with_name(f".{path.name}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        artifact.to_disk(file)
    artifact.rename_durably(temporary, path)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size:
        chunk = source.read(min(size, _CHUNK))
        target.write(chunk)
        size -= len(chunk)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
