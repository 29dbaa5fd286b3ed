"""The one trainer, for fits, distillation and recovery: Adam, a schedule, early stopping and checkpoints."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError
from gblm_compress.training.weights import Weights

WARM_UP = 0.1
CHECKPOINT_SECONDS = 600.0


@dataclass(frozen=True)
class Plan:
    """The numbers of the samples, and the hyperparameters.

    `rate` is the peak learning rate, relative to the root mean square of a tensor's values. It warms up linearly over
    the first tenth of the steps, then decays by a cosine.
    """

    steps: Sequence[Sequence[int]]
    held_out: Sequence[int]
    rate: float
    look_every: int  # steps between two evaluations of the validation loss ("looks")
    patience: int  # stop after this many evaluations without improvement
    together: int = 1  # samples in a forward pass
    own: Sequence[int] | None = None  # samples of this process, numbered from 0 for `loss`; None: a share of each step
    largest_norm: float = math.inf  # limit for the norm of all gradients together
    tokens: int = 0  # per step
    name: str = "training"
    advice: str = "give a smaller --rate"  # if the loss is not finite


@dataclass(frozen=True)
class Look:
    tokens: int
    loss: float | None  # mean training loss since the previous evaluation; None at the start
    held_out: float  # validation loss


@dataclass
class Progressed:
    step: int = 0
    curve: list[Look] = field(default_factory=list)
    best: int = 0  # index in the curve
    since: list[float] = field(default_factory=list)  # training losses since the last evaluation
    seconds: float = 0.0


class Store:
    """Keeps the best weights in memory, and no checkpoints; `Checkpoints` keeps both on disk."""

    def load(self) -> tuple[Progressed, dict[str, Tensor]] | None:
        return None

    def save(self, progress: Progressed, tensors: dict[str, Tensor]) -> None:
        pass

    def save_best(self, look: int, tensors: dict[str, Tensor]) -> None:
        self._best = {name: tensor.clone() for name, tensor in tensors.items()}

    def best(self, look: int) -> dict[str, Tensor]:
        return self._best


class Trainer:
    """One training of a network in eval mode. `loss` takes the numbers of samples and returns their mean loss.

    Raises ModelError if a loss is NaN or infinite.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: Weights,
        loss: Callable[[Sequence[int]], Tensor],
        plan: Plan,
        store: Store | None = None,
    ) -> None:
        self._network, self._weights, self._loss, self._plan = network, weights, loss, plan
        self._store, self._ranks = store or Store(), weights.ranks
        self._trained = {
            f"{name} {part}": parameter
            for name, master in weights.masters.items()
            for part, parameter in master.named_parameters()
        }
        groups = [{"params": [one], "lr": plan.rate * _size(one.detach())} for one in self._trained.values()]
        # All-zero tensors are not trained, and Adam takes no empty list.
        moving = [group for group in groups if group["lr"]]
        self._adam = torch.optim.Adam(moving or [{"params": [torch.zeros(0)]}], betas=(0.9, 0.95))
        self._rates = [group["lr"] for group in self._adam.param_groups]

    def run(
        self, step_done: Callable[[], None] = lambda: None, looked: Callable[[Look], None] = lambda look: None
    ) -> Progressed:
        """Train until the end or early stopping, then restore the best weights into the masters.

        `step_done` is called after each step, `looked` after each evaluation but the first.
        """
        plan, weights = self._plan, self._weights
        state, tensors = self._store.load() or (Progressed(), None)
        if tensors is not None:
            self._restore(tensors)
        with weights.trained_in(self._network):
            weights.show()
            if not state.curve:
                self._look(state)
            saved = time.monotonic()
            started = saved - state.seconds
            for batch in plan.steps[state.step :]:
                if len(state.curve) - 1 - state.best >= plan.patience:
                    break
                state.since.append(self._step(batch, state))
                step_done()
                if state.step % plan.look_every == 0 or state.step == len(plan.steps):
                    looked(self._look(state))
                now = time.monotonic()
                state.seconds = now - started
                if self._ranks.total(int(now - saved > CHECKPOINT_SECONDS)):
                    self._store.save(state, weights.state() | self._moments())
                    saved = time.monotonic()
        weights.restore(self._store.best(state.best))
        return state

    def _step(self, batch: Sequence[int], state: Progressed) -> float:
        plan, weights = self._plan, self._weights
        total = torch.zeros((), device=weights.device)
        for some in self._own(batch):
            with torch.enable_grad():
                loss = self._loss(some) * len(some) / len(batch)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._ranks.sum_([total])
        weights.pull()
        if plan.largest_norm < math.inf:
            masters = self._trained.values()
            norm = nn.utils.get_total_norm([one.grad for one in masters if one.grad is not None])
            squares = norm.square().to(weights.device)
            self._ranks.sum_([squares])
            nn.utils.clip_grads_with_norm_(masters, plan.largest_norm, squares.sqrt())
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * schedule_of(state.step, len(plan.steps))
        self._adam.step()
        for one in self._trained.values():  # tensors that Adam does not move have gradients too
            one.grad = None
        for master in weights.masters.values():
            master.settle_()
        weights.show()
        state.step += 1
        return self._finite(float(total), state)

    @torch.no_grad()
    def _look(self, state: Progressed) -> Look:
        plan = self._plan
        total = torch.zeros((), dtype=torch.float64, device=self._weights.device)
        for some in self._own(plan.held_out):
            total += float(self._loss(some)) * len(some)
        self._ranks.sum_([total])
        loss = sum(state.since) / len(state.since) if state.since else None
        look = Look(state.step * plan.tokens, loss, self._finite(float(total) / len(plan.held_out), state))
        state.curve.append(look)
        state.since = []
        if len(state.curve) == 1 or look.held_out < state.curve[state.best].held_out:
            state.best = len(state.curve) - 1
            self._store.save_best(state.best, self._weights.state())
        return look

    def _finite(self, loss: float, state: Progressed) -> float:
        if math.isfinite(loss):
            return loss
        advice = self._plan.advice if state.step else "look for NaN and infinity in the files of the model"
        raise ModelError(f"{self._plan.name}: the loss is {loss} at step {state.step}; {advice}")

    def _own(self, samples: Sequence[int]) -> list[Sequence[int]]:
        """This process's samples, grouped by forward pass."""
        own, count = self._plan.own, self._plan.together
        if own is None:
            mine = samples[self._ranks.rank :: self._ranks.size]
        else:
            mine = [own.index(one) for one in samples if one in own]
        return [mine[first : first + count] for first in range(0, len(mine), count)]

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name} {part}": tensor
            for name, one in self._trained.items()
            for part, tensor in self._adam.state.get(one, {}).items()
        }

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._weights.restore(tensors)
        for name, one in self._trained.items():
            if f"{name} step" in tensors:  # Adam counts its steps on the host
                moments = {part: tensors[f"{name} {part}"].to(one.device) for part in ("exp_avg", "exp_avg_sq")}
                self._adam.state[one] = {"step": tensors[f"{name} step"], **moments}


def schedule_of(step: int, steps: int) -> float:
    """The learning rate at a step, relative to its peak."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _size(values: Tensor) -> float:
    """Root mean square of the nonzero values."""
    alive = values[values != 0]
    return float(alive.square().mean().sqrt()) if len(alive) else 0.0
