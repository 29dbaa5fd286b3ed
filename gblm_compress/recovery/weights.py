"""What is trained of a student, spread over the processes, and what the network computes with.

The student itself holds what the network sees: pruned layers in the dtype of products, everything else in float32. A
master in float32 has the survivors alone where the mask is fixed. Every tensor has an owner among the processes, which
keeps its master and the optimiser's state: gradients are summed to the owner, and it sends what the network sees to all
(ZeRO, arXiv 1910.02054, stage 1).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.mask_rules import MASK_RULES, MaskRule
from gblm_compress.methods.optimisers import OPTIMISERS
from gblm_compress.methods.quantisation import Grid, rounded
from gblm_compress.methods.zeros import positive_zeros
from gblm_compress.models.architecture import as_matrix, head_and_embedding
from gblm_compress.recovery.survivors import Survivors
from gblm_compress.settings import RecoverSettings
from gblm_compress.training.masters import Masters

Read: TypeAlias = Callable[[str], Tensor]


class Weights:
    """The trained tensors of one student: all but those of head and embedding.

    Args:
        student: the pruned model in float32. It becomes what the network sees.
        layers: {name of the weight: pruned layer}.
        grids: {name of the weight: grid}, of the layers that lie on one.
        rule: what becomes of the masks.
        compute: dtype of products, which is the one in which the student holds weights of pruned layers.

    Attributes:
        layers: as given.
        masters: {name: float32 tensor} of this process: weights, numbers that stretch scales, and all others.
        keep: {name of the weight: mask [out_features, in_features]} of this process.
    """

    def __init__(
        self,
        student: Any,
        layers: Mapping[str, nn.Module],
        grids: Mapping[str, Grid],
        rule: MaskRule,
        compute: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.layers, self._rule, self._ranks = layers, rule, ranks
        self._parts = {
            name: Masters({name: layer}, {name: grids[name]} if name in grids else {}) for name, layer in layers.items()
        }
        parameters = dict(student.named_parameters())
        tables = {id(module.weight) for module in head_and_embedding(student) if module is not None}
        others = [name for name, one in parameters.items() if name not in layers and id(one) not in tables]
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in (*layers, *others)}
        self._owner = _owners({name: one.numel() for name, one in self.parameters.items()}, ranks.size)
        self._survivors = dict.fromkeys(self.parameters, Survivors())
        self._gradients: dict[str, Tensor] = {}
        self._keys: dict[str, list[str]] = {}
        self.masters: dict[str, Tensor] = {}
        self.keep: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self._take_over(name, parameter, compute)
            parameter.register_post_accumulate_grad_hook(partial(self._gather, name))  # type: ignore[no-untyped-call]
        self.show()

    def _take_over(self, name: str, parameter: nn.Parameter, compute: torch.dtype) -> None:
        """Make the master of a tensor on its owner, and leave the student with what products take."""
        dense = parameter.detach()
        start = self._parts[name].start if name in self._parts else {name: dense}
        self._keys[name] = list(start)
        if name in self._parts:
            if not self._rule.moves:
                self._survivors[name] = Survivors(dense != 0)
            elif self.owns(name):
                self.keep[name] = as_matrix(self.layers[name], dense) != 0
        # Experts are views of one tensor, some of them transposed; what is sent must lie in one piece.
        parameter.data = dense.to(compute if name in self._parts else torch.float32).contiguous()
        if self.owns(name):
            packed = start | {name: self._survivors[name].pack(dense)}
            self.masters |= {
                key: one.float().clone(memory_format=torch.contiguous_format).requires_grad_()
                for key, one in packed.items()
            }

    def owns(self, name: str) -> bool:
        """Whether this process has the master of a tensor."""
        return self._owner[name] == self._ranks.rank

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return next(iter(self.parameters.values())).device

    def matrix(self, name: str) -> Tensor:
        """The master of a layer's weight as [out_features, in_features]."""
        return as_matrix(self.layers[name], self._survivors[name].unpack(self.masters[name].detach()))

    def _is_seen_as_it_is(self, name: str) -> bool:
        """Whether the network sees the numbers of a master: neither a mask rule nor a grid stands between."""
        return name not in self.keep and (name not in self._parts or not self._parts[name].grids)

    def _seen(self, name: str, pruned: bool = False) -> Tensor:
        """What the network sees of a tensor that is this process's own, in float32; differentiable."""
        dense = self._survivors[name].unpack(self.masters[name])
        if name not in self._parts:
            return dense
        layer = self.layers[name]
        if name in self.keep:
            matrix, keep = as_matrix(layer, dense), self.keep[name]
            dense = as_matrix(layer, matrix * keep if pruned else self._rule.seen(matrix, keep))
        return self._parts[name].seen(self.masters | {name: dense})[name]

    @torch.no_grad()
    def show(self, pruned: bool = False) -> None:
        """Put into the student of every process what the network is to see: what the mask rule says, or the pruned
        weights, as they would be written."""
        for name, parameter in self.parameters.items():
            if self.owns(name):
                parameter.copy_(self._seen(name, pruned))
            self._ranks.send_(parameter.detach(), self._owner[name])

    def _gather(self, name: str, parameter: Tensor) -> None:
        """Add the gradient of a window to those before, and let go of the dense one."""
        assert parameter.grad is not None
        gradient = self._survivors[name].pack(parameter.grad).float()
        parameter.grad = None
        if name in self._gradients:
            self._gradients[name] += gradient
        else:
            self._gradients[name] = gradient

    def pass_gradients(self) -> None:
        """Sum what was gathered over all processes and pass it to the masters, which have none where no window came
        through."""
        came = torch.tensor([float(name in self._gradients) for name in self.parameters], device=self.device)
        self._ranks.sum_([came])
        for name, any_came in zip(self.parameters, came.tolist(), strict=True):
            if not any_came:
                continue
            gradient = self._gradients.pop(name, None)
            if gradient is None:
                nothing = torch.zeros_like(self.parameters[name], dtype=torch.float32)
                gradient = self._survivors[name].pack(nothing)
            self._ranks.sum_to_(gradient, self._owner[name])
            if not self.owns(name):
                continue
            if self._is_seen_as_it_is(name):
                self.masters[name].grad = gradient
            else:
                with torch.enable_grad():
                    self._seen(name).backward(self._survivors[name].unpack(gradient))  # type: ignore[no-untyped-call]

    def clip_gradients_(self, largest: float) -> None:
        """Scale the gradients of all processes down to a norm, over all tensors, where theirs is larger."""
        order = [key for keys in self._keys.values() for key in keys]
        norms = torch.zeros(len(order), device=self.device)
        for place, key in enumerate(order):
            if key in self.masters and (gradient := self.masters[key].grad) is not None:
                norms[place] = torch.linalg.vector_norm(gradient)
        self._ranks.sum_([norms])
        torch.nn.utils.clip_grads_with_norm_(self.masters.values(), largest, torch.linalg.vector_norm(norms))

    def drop_gradients(self) -> None:
        """Let go of the gradients of all masters."""
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Masters and masks of this process, {what it is and its name: tensor}."""
        masters = {f"weight {key}": master.detach() for key, master in self.masters.items()}
        return masters | {f"keep {name}": keep for name, keep in self.keep.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` gave."""
        for key, master in self.masters.items():
            master.copy_(state[f"weight {key}"])
        self.keep = {name: state[f"keep {name}"].to(self.device) for name in self.keep}
        self.show()

    def grids(self, read: Read) -> dict[str, Grid]:
        """{name of the weight: its grid} with trained scales, of layers that lie on one.

        Args:
            read: of a name that `state` gives, what was kept of it on any process.
        """
        return {
            name: part.stretched({key: read(f"weight {key}").to(self.device) for key in self._keys[name][1:]})[name]
            for name, part in self._parts.items()
            if part.grids
        }

    @torch.no_grad()
    def result(self, name: str, read: Read, grid: Grid | None) -> Tensor:
        """A trained tensor as the student is to be written, in float32, on its grid if it has one; zeros are +0.0."""
        dense = self._survivors[name].unpack(read(f"weight {name}").to(self.device))
        if name not in self.layers:
            return dense
        layer = self.layers[name]
        matrix = as_matrix(layer, dense)
        if self._rule.moves:
            matrix = matrix * read(f"keep {name}").to(self.device)
        if grid is not None:
            matrix = rounded(matrix, matrix != 0, grid)
        return positive_zeros(as_matrix(layer, matrix))

    def count(self, read: Read) -> int:
        """How many weights are trained, those that are pruned not counted."""
        masks = self._rule.moves
        return sum(
            int(read(f"keep {name}").sum()) if masks and name in self.layers else read(f"weight {name}").numel()
            for name in self.parameters
        )


def bytes_a_weight(settings: RecoverSettings, density: float, processes: int) -> float:
    """What a pruned weight takes of the memory of one process in training; activations and the dense model come on top.

    All processes have what the network sees and gradients; masters, Adam's two moments and masks that move are shared
    out. Under a mask that moves, pruned weights have all of it too, and the gradient is there before and after the
    rule.

    Args:
        density: share of the weights that survive.
        processes: over how many the masters are spread.
    """
    seen, moments = 2 if settings.fit_dtype == "bfloat16" else 4, OPTIMISERS[settings.optimiser].moment_bytes
    if MASK_RULES[settings.mask].moves:
        return seen + 4 + (4 + moments + 4 + 2) / processes
    return seen + density * (2 + 4 + (4 + moments) / processes)  # 2 of a survivor's column


def _owners(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """{name: process}, so that all have about as much: the largest first, each to the one that has least."""
    load = [0] * processes
    owner = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner
