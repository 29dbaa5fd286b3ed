"""The steps of a training: Adam over all weights but those of head and embedding, zeros kept by the mask rule.

A step takes a batch of windows, a few at a time on every process; gradients are summed over processes. Everything that
a step reads is in the checkpoint, so that a training that was broken off goes on to the same bits.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gblm_compress.calibration.blocks import only_requires_grad
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import ModelError
from gblm_compress.methods.mask_rules import MASK_RULES, Layer, Moment
from gblm_compress.methods.optimisers import OPTIMISERS
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models.architecture import as_matrix
from gblm_compress.progress import Progress
from gblm_compress.recovery.checkpointing import checkpointed
from gblm_compress.recovery.kept import Kept, Look, Progressed
from gblm_compress.recovery.losses import Losses
from gblm_compress.recovery.texts import Windows
from gblm_compress.recovery.weights import Weights
from gblm_compress.settings import RecoverSettings
from gblm_compress.training.fitting import BETAS, schedule_of

LARGEST_NORM = 1.0
"""Gradients of a larger norm, over all tensors, are scaled down to it."""

TOGETHER = 1024
"""Tokens of the windows that go through the network together: enough for fast products, few enough that their logits
are small beside a training."""

MOMENT = "moment"
"""The first word of the names that an optimiser's state has in checkpoints."""


@dataclass(frozen=True)
class Budget:
    """What the mask of a layer must have."""

    pattern: Pattern
    sparsity: float


class Training:
    """The training of one student.

    Args:
        weights: what is trained of the student.
        budgets: {name of the weight: what its mask must have}.
        windows: what is read.

    Attributes:
        progress: how far it is.
        grids: {name of the weight: its grid}, once training has ended.
        trained: how many weights were trained, those that are pruned in the end not counted; once training has ended.
    """

    def __init__(
        self,
        student: Any,
        weights: Weights,
        budgets: Mapping[str, Budget],
        losses: Losses,
        windows: Windows,
        settings: RecoverSettings,
        kept: Kept,
        ranks: Ranks,
    ) -> None:
        self._student, self._weights, self._budgets, self._losses = student, weights, budgets, losses
        self._windows, self._settings, self._kept, self._ranks = windows, settings, kept, ranks
        self._rule = MASK_RULES[settings.mask]
        self._first = dict(weights.keep)
        self._sizes = {key: _size(one.detach()[one.detach() != 0]) for key, one in weights.masters.items()}
        groups = [
            {"params": [master], "lr": settings.rate * self._sizes[key]}
            for key, master in weights.masters.items()
            if self._sizes[key] > 0
        ]
        # A process whose tensors are all zero has nothing to move, and Adam takes no empty list.
        self._optimiser = OPTIMISERS[settings.optimiser]
        self._adam = self._optimiser.build(groups or [{"params": [torch.zeros(0)]}], BETAS)
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self.grids: dict[str, Grid] = {}
        self.trained = 0
        self.progress = Progressed()

    def run(self, progress: Progress) -> None:
        """Train to the end, or until looks bring nothing new; `result` gives the best weights afterwards.

        Raises:
            ModelError: the loss is NaN or infinite.
            OutputError: a checkpoint cannot be written.
        """
        state, settings = self.progress, self._settings
        if self._kept.is_there:
            self._restore(*self._kept.load())
            state = self.progress
        recomputed = checkpointed(self._student) if settings.gradient_checkpointing else nullcontext()
        with only_requires_grad(self._student, self._weights.parameters.values()), recomputed:
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
                        progress.say(f"{latest.tokens:,} tokens: loss {latest.held_out:.4f} on held-out text")
                    now = time.monotonic()
                    state.seconds = before + now - started
                    due = now - saved > 60 * settings.checkpoint_minutes
                    if self._ranks.total(int(due), self._weights.device):
                        self._kept.save(state, self._weights.state() | self._moments())
                        saved = time.monotonic()
        best = self._kept.best(state.best)
        self.grids, self.trained = self._weights.grids(best), self._weights.count(best)

    def result(self, name: str) -> Tensor | None:
        """The best that a tensor of the student was; None of one that is not trained."""
        if name not in self._weights.parameters:
            return None
        return self._weights.result(name, self._kept.best(self.progress.best), self.grids.get(name))

    def _groups(self, windows: list[int]) -> list[list[int]]:
        """The windows that go through the network together."""
        count = max(1, TOGETHER // self._settings.sequence_length)
        return [windows[first : first + count] for first in range(0, len(windows), count)]

    @property
    def _is_over(self) -> bool:
        return len(self.progress.curve) - 1 - self.progress.best >= self._settings.patience

    def _step(self, batch: list[int]) -> float:
        """One step of Adam; the mean loss of the batch."""
        state, weights, steps = self.progress, self._weights, len(self._windows.steps)
        moment = Moment(state.step, steps, self._settings.mask_every)
        mine, total = batch[self._ranks.rank :: self._ranks.size], torch.zeros((), device=weights.device)
        with torch.enable_grad():
            for some in self._groups(mine):
                loss = self._losses.training(some) * len(some) / len(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        self._ranks.sum_([total])
        if not bool(total.isfinite()):
            raise ModelError(f"the loss is {float(total)} at step {state.step + 1}; give a smaller --rate")
        weights.pass_gradients()
        raw = {
            name: self._limit_gradient(name, moment) for name in weights.keep if weights.masters[name].grad is not None
        }
        weights.clip_gradients_(LARGEST_NORM)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * schedule_of(state.step, steps)
        self._adam.step()
        weights.drop_gradients()
        for name, gradient in raw.items():
            self._move_mask(name, gradient, moment)
        weights.show()
        state.step += 1
        return float(total)

    @torch.no_grad()
    def _limit_gradient(self, name: str, moment: Moment) -> Tensor:
        """Leave of a weight's gradient what the mask rule moves it by; gives the whole [out_features, in_features]."""
        layer, master = self._weights.layers[name], self._weights.masters[name]
        assert master.grad is not None
        raw = as_matrix(layer, master.grad)
        weight, keep = self._weights.matrix(name), self._weights.keep[name]
        own = self._rule.gradient(weight, raw, keep, self._settings.mask_decay, moment)
        master.grad = as_matrix(layer, own)
        return raw

    @torch.no_grad()
    def _move_mask(self, name: str, gradient: Tensor, moment: Moment) -> None:
        weights, budget, before = self._weights, self._budgets[name], self._weights.keep[name]
        master = weights.masters[name]
        weight = weights.matrix(name)

        def power() -> Tensor:
            return as_matrix(weights.layers[name], self._optimiser.power(self._adam, master))

        layer = Layer(weight, gradient, power, before, budget.pattern, budget.sparsity)
        keep = self._rule.next_mask(layer, moment)
        weights.keep[name] = keep
        settings, size = self._settings, self._sizes[name]
        pull = settings.mask_pull * settings.rate * schedule_of(moment.step, moment.steps) / size if size else 0.0
        after = self._rule.after(weight, before, keep, pull, moment)
        if after is not weight:
            weights.masters[name].copy_(as_matrix(weights.layers[name], after))

    @torch.no_grad()
    def _look(self) -> None:
        """Measure the held-out windows, and keep the weights if they are the best."""
        state, weights = self.progress, self._weights
        mine = self._windows.held_out[self._ranks.rank :: self._ranks.size]
        total = torch.zeros((), device=weights.device)
        if self._rule.relaxes:
            weights.show(pruned=True)
        for some in self._groups(mine):
            total += self._losses.of_predictions(some) * len(some)
        if self._rule.relaxes:
            weights.show()
        self._ranks.sum_([total])
        loss = sum(state.since) / len(state.since) if state.since else None
        tokens = state.step * self._settings.batch * self._settings.sequence_length
        held_out = float(total) / len(self._windows.held_out)
        state.curve.append(Look(tokens, loss, held_out, self._moved()))
        state.since = []
        if len(state.curve) == 1 or held_out < state.curve[state.best].held_out:
            state.best = len(state.curve) - 1
            self._kept.save_best(state.best, weights.state())

    def _moved(self) -> float:
        """The share of the first masks' survivors that are pruned now."""
        keep, device = self._weights.keep, self._weights.device
        first = self._ranks.total(sum(int(one.sum()) for one in self._first.values()), device)
        same = self._ranks.total(sum(int((one & keep[name]).sum()) for name, one in self._first.items()), device)
        return 1 - same / first if first else 0.0

    def _moments(self) -> dict[str, Tensor]:
        """What the optimiser knows of the masters of this process, {what it is and its name: tensor}."""
        return {
            f"{MOMENT} {part} {key}": tensor
            for key, master in self._weights.masters.items()
            for part, tensor in self._optimiser.state(self._adam, master).items()
        }

    def _restore(self, progress: Progressed, state: dict[str, Tensor]) -> None:
        self.progress = progress
        self._weights.restore(state)
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition(" ")
            if kind == MOMENT:
                part, _, key = rest.partition(" ")
                moments.setdefault(key, {})[part] = tensor
        for key, parts in moments.items():
            self._optimiser.restore(self._adam, self._weights.masters[key], parts)


def _size(values: Tensor) -> float:
    """The root mean square; 0 of nothing."""
    return float(values.square().mean().sqrt()) if len(values) else 0.0
