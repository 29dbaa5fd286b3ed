"""A model's weights as they lie on disk: safetensors files, read one tensor at a time and rewritten in one stream.

Nothing here holds more than one tensor, or the experts of one block. Files are mapped only while a tensor is read, so
that the pages of a large checkpoint do not pile up in the resident memory of the process.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.models import files
from gblm_compress.models.conversion import Group, TensorNames
from gblm_compress.storage import records

DIGEST = "sha256"
"""The key of a file's metadata under which `save_durably` states the hash of its tensors."""

_CHUNK = 16 << 20


class Checkpoint:
    """The safetensors of a Hugging Face folder, addressed by the names that the model gives its tensors.

    What transformers converts while loading is converted here too, both ways. The tensors of experts are those of the
    fused ones, or of the files of each, as `experts` names them.

    Args:
        folder: the Hugging Face folder.
        names: of the model's tensors.

    Raises:
        ModelError: a file is damaged or missing.
    """

    def __init__(self, folder: Path, names: TensorNames) -> None:
        self.files, self.names = files.weight_files(folder), names
        self._index = files.index_file(folder)
        self._where = {key: path for path in self.files for key in keys(path)}
        self._groups = names.groups(self._where)
        self._group_of = {name: group for group in self._groups.values() for name in names.targets(group)}
        self._parts: dict[str, list[str]] = {}
        for part, (fused, _) in names.views.items():
            self._parts.setdefault(fused, []).append(part)
        self._made = _Latest()

    def __contains__(self, name: str) -> bool:
        return self.names.views.get(name, (name,))[0] in self._group_of

    def read(self, name: str) -> Tensor:
        """The tensor of that name in the checkpoint's dtype, mapped to its file where possible.

        Raises:
            ModelError: there is none, or its file is damaged.
        """
        whole, view = self.names.views.get(name, (name, None))
        if whole not in self._group_of:
            raise ModelError(
                f"{name}: no such tensor in {self.files[0].parent}; the checkpoint is incomplete, or of another "
                "architecture than config.json says"
            )
        group = self._group_of[whole]
        if view is None and group.converter is None:
            return next(self._read(key) for key in group.sources)
        made = self._made.of(group.target, lambda: self.names.made(group, self._read))
        return made[whole] if view is None else view(made[whole]).clone()

    def rewrite(self, folder: Path, changed: Callable[[str], Tensor | None]) -> None:
        """Write the checkpoint to `folder`, file by file under the same names, with some tensors changed.

        Args:
            changed: gives the new tensor of a name, of the same shape and dtype, or None where it stays.
        """
        weight_map = {}
        written = _Latest()
        for path in self.files:
            header, metadata, data = files.read_header(path)
            with path.open("rb") as source, (folder / path.name).open("wb") as target:
                entries = {self._written_name(key): entry for key, entry in header.items()}
                text = json.dumps(
                    {"__metadata__": metadata | {"format": "pt"}, **entries}, separators=(",", ":")
                ).encode()
                text += b" " * (-len(text) % 8)
                target.write(len(text).to_bytes(8, "little") + text)
                for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                    begin, end = entry["data_offsets"]
                    weight_map[self._written_name(key)] = path.name
                    group = self._groups[key]
                    tensor = written.of(group.target, partial(self._changed, group, changed)).get(key)
                    if tensor is None:
                        source.seek(data + begin)
                        _copy(source, target, end - begin)
                    else:
                        assert list(tensor.shape) == entry["shape"], "a changed tensor keeps its shape"
                        assert tensor.nbytes == end - begin, "a changed tensor keeps its dtype"
                        target.write(_bytes(tensor))
                records.to_disk(target)
        if self._index is not None:
            content = records.read_json(self._index) | {"weight_map": weight_map}
            (folder / self._index.name).write_text(json.dumps(content, indent=2, sort_keys=True))

    def _read(self, key: str) -> Tensor:
        return read_tensor(self._where[key], key)

    def _changed(self, group: Group, changed: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """{name in the files: new tensor} of a group; empty where it stays as it is."""
        names = [part for name in self.names.targets(group) for part in self._parts.get(name, [name])]
        new = {name: tensor for name in names if (tensor := changed(name)) is not None}
        if not new or (group.converter is None and len(names) == 1):
            return {key: tensor for key in group.sources for tensor in new.values()}
        made = {name: tensor.clone() for name, tensor in self.names.made(group, self._read).items()}
        for name, tensor in new.items():
            whole, view = self.names.views.get(name, (name, None))
            (made[whole] if view is None else view(made[whole])).copy_(tensor)
        return self.names.unmade(group, made)

    def _written_name(self, key: str) -> str:
        """The name of a tensor in a rewritten file: its own, with the prefix that a bare backbone lacks."""
        group = self._groups[key]
        return self.names.whole(key) if group.converter is None and group.target == key else key


class _Latest:
    """Tensors of the groups that were asked for last: files have the tensors of a block's experts in turns."""

    KEPT = 3

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def of(self, group: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if group not in self._tensors:
            while len(self._tensors) >= self.KEPT:
                del self._tensors[next(iter(self._tensors))]
            self._tensors[group] = make()
        return self._tensors[group]


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
