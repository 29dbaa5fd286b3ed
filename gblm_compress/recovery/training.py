"""The steps of a training: Adam over all weights but those of head and embedding, zeros kept by the mask rule.

Weights are float32, products in the dtype of the settings. A step takes a batch of windows, one at a time on every
process; gradients are summed over processes. Everything that a step reads is in the checkpoint, so that a training that
was broken off goes on to the same bits.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import only_requires_grad
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import ModelError
from gblm_compress.methods.mask_rules import MASK_RULES, Moment
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid
from gblm_compress.methods.zeros import positive_zeros
from gblm_compress.models.architecture import as_matrix, head_and_embedding
from gblm_compress.progress import Progress
from gblm_compress.pruning.fitting import BETAS, schedule_of
from gblm_compress.pruning.masters import Masters
from gblm_compress.recovery.kept import Kept, Look, Progressed
from gblm_compress.recovery.losses import Losses
from gblm_compress.recovery.texts import Windows
from gblm_compress.settings import RecoverSettings

LARGEST_NORM = 1.0
"""Gradients of a larger norm, over all tensors, are scaled down to it."""


@dataclass(frozen=True)
class Budget:
    """What the mask of a layer must have."""

    pattern: Pattern
    sparsity: float


class Training:
    """The training of one student.

    Args:
        student: the pruned model in float32.
        layers: {name of the weight: pruned layer}.
        budgets: {name of the weight: what its mask must have}.
        grids: {name of the weight: grid}, of the layers that lie on one.
        windows: what is read.

    Attributes:
        progress: how far it is.
        grids: {name of the weight: its grid}, once the student has its weights.
    """

    def __init__(
        self,
        student: Any,
        layers: Mapping[str, nn.Module],
        budgets: Mapping[str, Budget],
        grids: Mapping[str, Grid],
        losses: Losses,
        windows: Windows,
        settings: RecoverSettings,
        ranks: Ranks,
    ) -> None:
        self._student, self._layers, self._budgets, self._losses = student, layers, budgets, losses
        self._windows, self._settings, self._ranks = windows, settings, ranks
        self._rule = MASK_RULES[settings.mask]
        self._masters = Masters(layers, grids)
        tables = {id(module.weight) for module in head_and_embedding(student) if module is not None}
        others = {
            name: parameter
            for name, parameter in student.named_parameters()
            if name not in layers and id(parameter) not in tables
        }
        self._others = list(others)
        start = self._masters.start | others
        self._moved = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in start.items()}
        self._keep = {name: self._matrix(name) != 0 for name in layers}
        self._first = {name: keep.clone() for name, keep in self._keep.items()}
        groups = [
            {"params": [master], "lr": settings.rate * float(size)}
            for name, master in self._moved.items()
            if (size := _size(master.detach()[master.detach() != 0])) > 0
        ]
        self._adam = torch.optim.Adam(groups, betas=BETAS)
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self._best: dict[str, Tensor] = {}
        self._best_keep: dict[str, Tensor] = {}
        self.grids: dict[str, Grid] = {}
        self.progress = Progressed()

    def run(self, kept: Kept, progress: Progress) -> None:
        """Train to the end, or until looks bring nothing new; the best weights are in the student afterwards.

        Raises:
            ModelError: the loss is NaN or infinite.
            OutputError: a checkpoint cannot be written.
        """
        state, settings = self.progress, self._settings
        if kept.is_there:
            self._restore(*kept.load())
            state = self.progress
        with only_requires_grad(self._student, []):
            if not state.curve:
                self._look()
            started = saved = time.monotonic()
            before = state.seconds
            left = self._windows.steps[state.step :]
            tokens = sum(map(len, left)) * settings.sequence_length
            with progress.counter("training", "steps", len(left), tokens) as advance:
                for batch in left:
                    if self._is_over:
                        break
                    state.since.append(self._step(batch))
                    advance()
                    if state.step % settings.look_every == 0 or state.step == len(self._windows.steps):
                        self._look()
                        latest = state.curve[-1]
                        progress.say(f"{latest.tokens:,} tokens: KL {latest.held_out:.4f} on held-out text")
                    now = time.monotonic()
                    state.seconds = before + now - started
                    due = now - saved > 60 * settings.checkpoint_minutes
                    if self._ranks.total(int(due), self._device):
                        kept.save(state, self._state())
                        saved = time.monotonic()
        self._write()

    @property
    def trained(self) -> int:
        """How many weights were trained, those that are pruned in the end not counted."""
        survivors = sum(int(keep.sum()) for keep in self._best_keep.values())
        return survivors + sum(self._moved[name].numel() for name in self._others)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._moved.values())).device

    @property
    def _is_over(self) -> bool:
        return len(self.progress.curve) - 1 - self.progress.best >= self._settings.patience

    def _matrix(self, name: str) -> Tensor:
        """A weight as [out_features, in_features]."""
        return as_matrix(self._layers[name], self._moved[name].detach())

    def _seen(self) -> dict[str, Tensor]:
        """What the network computes with; differentiable."""
        masked = {
            name: as_matrix(layer, self._rule.seen(as_matrix(layer, self._moved[name]), self._keep[name]))
            for name, layer in self._layers.items()
        }
        seen = self._masters.seen(self._moved | masked)
        return seen | {name: self._moved[name] for name in self._others}

    def _step(self, batch: list[int]) -> float:
        """One step of Adam; the mean loss of the batch."""
        state, settings = self.progress, self._settings
        self._adam.zero_grad()
        mine, total = batch[self._ranks.rank :: self._ranks.size], torch.zeros((), device=self._device)
        with torch.enable_grad():
            projected = self._seen()
            leaves = {name: one.detach().requires_grad_() for name, one in projected.items()}
            for index in mine:
                loss = self._losses.training(leaves, index) / len(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            ran = [name for name, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([projected[name] for name in ran], [leaves[name].grad for name in ran])
        gradients = [one.grad for one in self._moved.values() if one.grad is not None]
        self._ranks.sum_([total, *gradients])
        if not bool(total.isfinite()):
            raise ModelError(f"the loss is {float(total)} at step {state.step + 1}; give a smaller --rate")
        raw = {}
        for name, layer in self._layers.items():
            master = self._moved[name]
            if master.grad is None:
                continue
            raw[name] = as_matrix(layer, master.grad).clone() if self._rule.moves else master.grad
            own = self._rule.gradient(
                as_matrix(layer, master.detach()), as_matrix(layer, master.grad), self._keep[name], settings.mask_decay
            )
            master.grad = as_matrix(layer, own)
        torch.nn.utils.clip_grad_norm_(list(self._moved.values()), LARGEST_NORM)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * schedule_of(state.step, len(self._windows.steps))
        self._adam.step()
        moment = Moment(state.step, len(self._windows.steps), settings.mask_every)
        for name, gradient in raw.items():
            self._move_mask(name, gradient, moment)
        state.step += 1
        return float(total)

    @torch.no_grad()
    def _move_mask(self, name: str, gradient: Tensor, moment: Moment) -> None:
        layer, budget, before = self._layers[name], self._budgets[name], self._keep[name]
        weight = self._matrix(name)
        keep = self._rule.next_mask(weight, gradient, before, budget.pattern, budget.sparsity, moment)
        if keep is not before:
            self._keep[name] = keep
            self._moved[name].copy_(as_matrix(layer, self._rule.kept(weight, before, keep)))

    @torch.no_grad()
    def _look(self) -> None:
        """Measure the held-out windows, and keep the weights if they are the best."""
        state, seen = self.progress, self._seen()
        mine = self._windows.held_out[self._ranks.rank :: self._ranks.size]
        total = torch.zeros((), device=self._device)
        for index in mine:
            total += self._losses.divergence(seen, index)
        self._ranks.sum_([total])
        kept = sum(int(keep.sum()) for keep in self._first.values())
        same = sum(int((keep & self._keep[name]).sum()) for name, keep in self._first.items())
        loss = sum(state.since) / len(state.since) if state.since else None
        tokens = state.step * self._settings.batch * self._settings.sequence_length
        held_out = float(total) / len(self._windows.held_out)
        state.curve.append(Look(tokens, loss, held_out, 1 - same / max(1, kept)))
        state.since = []
        if len(state.curve) == 1 or held_out < state.curve[state.best].held_out:
            state.best = len(state.curve) - 1
            self._best = {name: one.detach().clone() for name, one in self._moved.items()}
            self._best_keep = dict(self._keep)

    @torch.no_grad()
    def _write(self) -> None:
        """Put the best weights into the student; what is pruned is +0.0."""
        moved = dict(self._best)
        for name, layer in self._layers.items():
            moved[name] = as_matrix(layer, positive_zeros(as_matrix(layer, moved[name]) * self._best_keep[name]))
        self.grids = self._masters.write_(moved)
        parameters = dict(self._student.named_parameters())
        for name in self._others:
            parameters[name].copy_(moved[name])

    def _state(self) -> dict[str, Tensor]:
        """Everything that the next step reads."""
        state: dict[str, Tensor] = {}
        for name, one in self._moved.items():
            state[f"weight {name}"], state[f"best {name}"] = one.detach(), self._best[name]
            state |= {f"{part} {name}": self._adam.state[one][part] for part in self._adam.state.get(one, {})}
        for name, keep in self._keep.items():
            state |= {f"keep {name}": keep, f"best keep {name}": self._best_keep[name].clone()}  # may be one tensor
        return state

    @torch.no_grad()
    def _restore(self, progress: Progressed, state: dict[str, Tensor]) -> None:
        self.progress = progress
        for name, one in self._moved.items():
            one.copy_(state[f"weight {name}"])
            self._best[name] = state[f"best {name}"].to(one.device)
            found = {part: state.get(f"{part} {name}") for part in ("step", "exp_avg", "exp_avg_sq")}
            if found["step"] is not None:
                # Adam counts its steps on the host.
                self._adam.state[one] = {
                    part: tensor if part == "step" else tensor.to(one.device)
                    for part, tensor in found.items()
                    if tensor is not None
                }
        for name in self._keep:
            self._keep[name] = state[f"keep {name}"].to(self._device)
            self._best_keep[name] = state[f"best keep {name}"].to(self._device)


def _size(values: Tensor) -> float:
    """The root mean square; 0 of nothing."""
    return float(values.square().mean().sqrt()) if len(values) else 0.0
