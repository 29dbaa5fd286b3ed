"""A model's weights on disk: safetensors files, read by the model's names, rewritten in one stream.

transformers renames and converts tensors while it loads: Mixtral's files have a matrix for each expert, its model one
parameter for all. The mapping goes both ways. A file is mapped only while it is read.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

from gblm_compress.errors import ModelError, translated
from gblm_compress.models import files
from gblm_compress.models.experts import fused_weights
from gblm_compress.storage import records

_CHUNK = 16 << 20
_KEPT_GROUPS = 3  # files interleave the tensors of a block's experts


@dataclass(eq=False)
class _Group:
    """Tensors of files that make tensors of the model, by transformers' names."""

    converter: Any  # None for a plain tensor
    target: str
    # {name in the files: (pattern of the converter, name before conversion)}
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)


class _Names:
    """The mapping between tensors of files and of a model. Keeps no parameter of the model alive."""

    def __init__(self, model: Any) -> None:
        self.views = fused_weights(model)
        state = model.state_dict()
        self.own = {name: torch.empty_like(one, device="meta") for name, one in state.items() if name not in self.views}
        self._known = set(self.own) | {fused for fused, _ in self.views.values()}
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]

        def parameter(name: str) -> Any:
            return self.own.get(self.whole(name))

        # The parts of a model that conversions use.
        self._about = {"model": SimpleNamespace(dtype=model.dtype, get_parameter=parameter), "config": model.config}

    def groups(self, keys: Iterable[str]) -> dict[str, _Group]:
        """{name in the files: its group}."""
        renamings = deepcopy(self._renamings)  # some remember their inputs
        by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        by_target: dict[str, _Group] = {}
        found = {}
        for key in sorted(keys, key=dot_natural_key):
            before = apply_renamings(key, renamings)
            target, pattern = apply_converters(before, self._converters)
            if self.whole(target) not in self._known and self.whole(key) in self._known:
                before, target, pattern = key, key, None  # named as in the model already
            group = by_target.setdefault(target, _Group(by_pattern.get(pattern), target))
            group.sources[key] = (pattern or key, before)
            found[key] = group
        return found

    def whole(self, name: str) -> str:
        """A name in the whole model: files of a bare backbone lack its prefix, or have an extra one."""
        with_prefix, without = f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")
        return next((one for one in (name, with_prefix, without) if one in self._known), name)

    def targets(self, group: _Group) -> dict[str, str]:
        """{name in the model: transformers' name} of the tensors that a group makes."""
        patterns = group.converter.target_patterns if group.converter else [group.target]
        names = [group.target.replace(patterns[0], pattern, 1) for pattern in patterns]
        return {self.whole(name): name for name in names}

    def made(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """{name in the model: tensor} of a group."""
        if group.converter is None:
            return {self.whole(group.target): read(key) for key in group.sources}
        converter = deepcopy(group.converter)
        for key, (pattern, _) in group.sources.items():
            converter.add_tensor(group.target, key, pattern, read(key))
        return {self.whole(name): tensor for name, tensor in self._converted(converter, group.target).items()}

    def unmade(self, group: _Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name in the files: tensor} from all tensors of a group: the inverse of `made`."""
        if group.converter is None:
            return {key: tensors[self.whole(group.target)] for key in group.sources}
        converter = group.converter.reverse_transform()
        names, target = self.targets(group), ""
        for whole, tensor in tensors.items():
            target, pattern = converter.rename_source_key(names[whole])
            converter.add_tensor(target, names[whole], pattern, tensor)
        found = self._converted(converter, target)
        if missing := [key for key, (_, before) in group.sources.items() if before not in found]:
            raise ModelError(
                f"{missing[0]}: transformers converts this tensor while loading and does not convert it back; save the "
                "model with save_pretrained first"
            )
        return {key: found[before] for key, (_, before) in group.sources.items()}

    def _converted(self, converter: Any, target: str) -> dict[str, Tensor]:
        with translated(lambda said: ModelError(f"{target}: transformers cannot convert this tensor ({said})")):
            made = converter.convert(target, **self._about)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


class Checkpoint:
    """The safetensors files of a folder, addressed by the names of the model's tensors.

    Experts have the names of fused parameters, or of each expert's layers. The model is not kept.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self.files, self._index = files.weight_files(folder), files.index_file(folder)
        self._names = names = _Names(model)
        headers = {path: files.read_header(path)[0] for path in self.files}
        self._where = where = {key: path for path, header in headers.items() for key in header}
        self._entries = {key: entry for header in headers.values() for key, entry in header.items()}
        self._groups = names.groups(where)
        self._group_of = {name: group for group in self._groups.values() for name in names.targets(group)}
        self._parts: dict[str, list[str]] = {}
        for part, (fused, _) in names.views.items():
            self._parts.setdefault(fused, []).append(part)

        def read(key: str) -> Tensor:
            return read_tensor(where[key], key)

        self._read = read
        self.forget()

    def __contains__(self, name: str) -> bool:
        return self._names.views.get(name, (name,))[0] in self._group_of

    def stored_as(self, name: str) -> str:
        """The dtype of a tensor as its file's header calls it, for example "BF16"; nothing is read."""
        whole, _ = self._names.views.get(name, (name, None))
        dtype: str = self._entries[next(iter(self._group_of[whole].sources))]["dtype"]
        return dtype

    def read(self, name: str) -> Tensor:
        """The tensor of that name in the checkpoint's dtype, mapped to its file if possible.

        A part of a converted tensor, as of one expert, is in the memory that `forget` lets go.
        """
        whole, view = self._names.views.get(name, (name, None))
        if whole not in self._group_of:
            raise ModelError(
                f"{name}: no such tensor in {self.files[0].parent}; the checkpoint is incomplete, or of another "
                "architecture than config.json says"
            )
        group = self._group_of[whole]
        made = next(map(self._read, group.sources)) if group.converter is None else self._made(group)[whole]
        return made if view is None else view(made)

    def forget(self) -> None:
        """Convert tensors anew when they are next read: the last ones may have been changed."""
        self._made = _latest(lambda group: self._names.made(group, self._read))

    def check_shapes(self) -> None:
        """ModelError if a tensor that needs no conversion has another shape in the files than in the model."""
        for key, group in self._groups.items():
            needed = None if group.converter else self._names.own.get(self._names.whole(group.target))
            if needed is not None:
                check_shape(key, self._entries[key]["shape"], needed)

    def not_finite(self, name: str, dtype: torch.dtype) -> ModelError:
        """Why a parameter that was loaded as `dtype` holds NaN or infinity: the stored tensor and its file."""
        whole = self._names.views.get(name, (name,))[0]
        for key in self._group_of[whole].sources if whole in self._group_of else self._groups:
            stored = self._read(key)
            if bad := int((~stored.isfinite()).sum()):
                return ModelError(
                    f"{str(self._where[key])!r}: {bad:,} of {stored.numel():,} values of {key!r} are NaN or infinite; "
                    "the file is damaged, or its training diverged: fetch the model again, or use another checkpoint"
                )
        return ModelError(f"{name} holds values beyond the range of {dtype}; give --dtype float32 or bfloat16")

    def rewrite(self, folder: Path, changed: Callable[[str], Tensor | None]) -> None:
        """Write the checkpoint to `folder`; `changed` gives a tensor's new value, or None to keep it."""
        weight_map = {}
        written = _latest(lambda group: self._changed(group, changed))
        for path in self.files:
            header, metadata, data = files.read_header(path)
            with path.open("rb") as source, (folder / path.name).open("wb") as target:
                entries = {self._written_name(key): entry for key, entry in header.items()}
                content = {"__metadata__": metadata | {"format": "pt"}, **entries}
                text = json.dumps(content, separators=(",", ":")).encode()
                text += b" " * (-len(text) % 8)
                target.write(len(text).to_bytes(8, "little") + text)
                for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                    begin, end = entry["data_offsets"]
                    weight_map[self._written_name(key)] = path.name
                    tensor = written(self._groups[key]).get(key)
                    if tensor is None:
                        source.seek(data + begin)
                        for place in range(begin, end, _CHUNK):
                            target.write(source.read(min(_CHUNK, end - place)))
                    else:
                        assert list(tensor.shape) == entry["shape"], "a changed tensor keeps its shape"
                        assert tensor.nbytes == end - begin, "a changed tensor keeps its dtype"
                        target.write(_bytes(tensor))
                records.to_disk(target)
        if self._index is not None:
            content = records.read_json(self._index) | {"weight_map": weight_map}
            (folder / self._index.name).write_text(json.dumps(content, indent=2, sort_keys=True))

    def _changed(self, group: _Group, changed: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        names = [part for name in self._names.targets(group) for part in self._parts.get(name, [name])]
        if group.converter is None and len(names) == 1:
            tensor = changed(names[0])
            return {} if tensor is None else dict.fromkeys(group.sources, tensor)
        made: dict[str, Tensor] = {}
        for name in names:
            if (tensor := changed(name)) is None:
                continue
            # Each part is changed in the tensor that the next one is read from, so that no second one is needed.
            made = made or (self._made(group) if group.converter else self._names.made(group, self._read))
            whole, view = self._names.views.get(name, (name, None))
            (made[whole] if view is None else view(made[whole])).copy_(tensor)
        self.forget()
        return self._names.unmade(group, made) if made else {}

    def _written_name(self, key: str) -> str:
        """A tensor's name in a rewritten file, with the prefix that a bare backbone lacks."""
        group = self._groups[key]
        return self._names.whole(key) if group.converter is None and group.target == key else key


def _latest(make: Callable[[_Group], dict[str, Tensor]]) -> Callable[[_Group], dict[str, Tensor]]:
    """`make` with the latest results kept; it forgets before it makes, to save memory."""
    made: dict[_Group, dict[str, Tensor]] = {}

    def of(group: _Group) -> dict[str, Tensor]:
        if group not in made:
            while len(made) >= _KEPT_GROUPS:
                del made[next(iter(made))]
            made[group] = make(group)
        return made[group]

    return of


def check_shape(name: str, stored: list[int], needed: Tensor) -> None:
    if stored != list(needed.shape):
        raise ModelError(
            f"{name} has the shape {stored} in the checkpoint; the architecture of config.json needs "
            f"{list(needed.shape)}: the folder is damaged or of another model"
        )


def read_tensor(path: Path, key: str) -> Tensor:
    with files.refusing_damage(path), safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    with files.refusing_damage(path):
        return load_file(path)


def save_durably(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all, even if the machine stops."""
    temporary = path.with_name(f".{path.name}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        records.to_disk(file)
    records.rename_durably(temporary, path)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
