"""Which tensors of a model's files make which tensors of the model, by transformers' own conversion mapping.

transformers renames and converts tensors while it loads a checkpoint: Mixtral's files have a matrix for each expert,
and its model has one parameter for all of them. Only this module knows that mapping. It goes both ways, so that files
keep their own names and layout when what the model has of them is changed.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

from gblm_compress.errors import ModelError, first_line
from gblm_compress.models.experts import fused_weights


@dataclass
class Group:
    """Tensors of files that make tensors of the model together.

    Attributes:
        converter: what makes them; None for one tensor that stays as it is.
        target: what transformers calls the first of the tensors that are made.
        sources: {name in the files: (pattern of the converter, name that transformers gives it before conversion)}.
    """

    converter: Any
    target: str
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)


class TensorNames:
    """The names of a model's tensors, and how they are made from those of files.

    Args:
        model: a model, its parameters on any device; its experts may be fused or not.
    """

    def __init__(self, model: Any) -> None:
        self.views = fused_weights(model)
        state = model.state_dict()
        own = {name: torch.empty_like(one, device="meta") for name, one in state.items() if name not in self.views}
        self._known = set(own) | {fused for fused, _ in self.views.values()}
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}

        def parameter(name: str) -> Any:
            return own.get(self.whole(name))

        # What operations ask of the model; the names outlive it.
        self._about = {"model": SimpleNamespace(dtype=model.dtype, get_parameter=parameter), "config": model.config}

    def groups(self, keys: Iterable[str]) -> dict[str, Group]:
        """{name in the files: the group that it belongs to}."""
        renamings = deepcopy(self._renamings)  # some remember what they have seen
        by_target: dict[str, Group] = {}
        found = {}
        for key in sorted(keys, key=dot_natural_key):
            before = apply_renamings(key, renamings)
            target, pattern = apply_converters(before, self._converters)
            if self.whole(target) not in self._known and self.whole(key) in self._known:
                before, target, pattern = key, key, None  # named as in the model already
            group = by_target.setdefault(target, Group(self._by_pattern.get(pattern), target))
            group.sources[key] = (pattern or key, before)
            found[key] = group
        return found

    def whole(self, name: str) -> str:
        """A name as the whole model has it: files of a bare backbone lack its prefix, or have one too many."""
        with_prefix, without = f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")
        return next((one for one in (name, with_prefix, without) if one in self._known), name)

    def targets(self, group: Group) -> list[str]:
        """The names of the model's tensors that a group makes."""
        if group.converter is None:
            return [self.whole(group.target)]
        first, *others = group.converter.target_patterns
        return [self.whole(group.target.replace(first, other, 1)) for other in (first, *others)]

    def made(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """{name in the model: tensor} of a group.

        Args:
            read: gives the tensor of a name in the files.
        """
        if group.converter is None:
            return {self.whole(group.target): read(key) for key in group.sources}
        converter = deepcopy(group.converter)
        for key, (pattern, _) in group.sources.items():
            converter.add_tensor(group.target, key, pattern, read(key))
        return {self.whole(name): tensor for name, tensor in self._run(converter, group.target).items()}

    def unmade(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name in the files: tensor} from all tensors that the group makes; the way back of `made`.

        Raises:
            ModelError: transformers cannot give back every tensor of the files.
        """
        if group.converter is None:
            return {key: tensors[self.whole(group.target)] for key in group.sources}
        converter = group.converter.reverse_transform()
        names = {self.whole(name): name for name in self._made_names(group)}
        target = ""
        for whole, tensor in tensors.items():
            target, pattern = converter.rename_source_key(names[whole])
            converter.add_tensor(target, names[whole], pattern, tensor)
        found = self._run(converter, target)
        missing = [key for key, (_, before) in group.sources.items() if before not in found]
        if missing:
            raise ModelError(
                f"{missing[0]}: transformers converts this tensor while loading and does not convert it back; save the "
                "model with save_pretrained first"
            )
        return {key: found[before] for key, (_, before) in group.sources.items()}

    def _made_names(self, group: Group) -> list[str]:
        first, *others = group.converter.target_patterns
        return [group.target.replace(first, other, 1) for other in (first, *others)]

    def _run(self, converter: Any, target: str) -> dict[str, Tensor]:
        try:
            made = converter.convert(target, **self._about)
        except Exception as error:  # its operations raise kinds of their own for tensors that do not fit
            raise ModelError(f"{target}: transformers cannot convert this tensor ({first_line(error)})") from error
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}
