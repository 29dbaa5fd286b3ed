"""Adam over the surviving weights of a network, with early stopping on held-out samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT_EVERY = 8
BATCH = 2
"""Samples whose gradients one step averages."""
PATIENCE = 2
WARM_UP = 0.1
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Fit:
    """How a fit went.

    Attributes:
        before, after: the mean loss over the held-out samples.
        epochs: how many passes over the other samples led to the weights that were kept; 0 where none helped.
    """

    before: float
    after: float
    epochs: int


def fit(
    weights: dict[str, Tensor],
    loss: Callable[[dict[str, Tensor], int], Tensor],
    samples: int,
    *,
    epochs: int,
    rate: float,
    revive: bool = False,
    project: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda masters: masters,
    step_done: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], Fit]:
    """Minimise the mean of `loss` over samples; it sees the zeros of `weights` as zeros throughout.

    Every 8th sample is held out (the only one serves both purposes). After every epoch the held-out loss is taken,
    the best weights seen are returned, those given included, and two epochs in a row without a new best end the fit.
    The learning rate of each tensor is `rate` times the root mean square of its surviving weights, so that one
    value suits layers and models of any scale; it rises over the first tenth of the steps and falls as a half cosine.

    Args:
        weights: {name: tensor with exact zeros where weights are pruned}; copied to float32 masters.
        loss: of (weights, index of a sample).
        samples: how many samples there are.
        epochs: passes over the samples that are not held out, at most.
        rate: the relative learning rate.
        revive: pruned weights, zero in the loss, gather their steps as survivors do, so that a new mask can be chosen
            (the straight-through estimator of SR-STE, arXiv 2102.04010).
        project: of the masters, what `loss` sees of them; differentiable.
        step_done: called after each sample of training.

    Returns:
        {name: float32 tensor with the same zeros, or if `revive` with what pruned weights gathered} and how it went.
    """
    held_out = list(range(HELD_OUT_EVERY - 1, samples, HELD_OUT_EVERY)) or [samples - 1]
    training = [index for index in range(samples) if index not in held_out] or held_out
    masters = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in weights.items()}
    masks = {name: tensor != 0 for name, tensor in weights.items()}
    gathered = {name: torch.zeros_like(master) for name, master in masters.items()} if revive else {}
    groups = [
        {"params": [master], "lr": rate * float(master.detach()[masks[name]].square().mean().sqrt())}
        for name, master in masters.items()
        if masks[name].any()
    ]
    steps_per_epoch = math.ceil(len(training) / BATCH)

    def mean_held_out() -> float:
        with torch.no_grad():
            seen = project(masters)
            return sum(float(loss(seen, index)) for index in held_out) / len(held_out)

    def add_gradients(chosen: list[int]) -> None:
        with torch.enable_grad():
            projected = project(masters)
            # What is projected takes the gradients of all samples before they go on to the masters.
            seen = {name: one if one.is_leaf else one.detach().requires_grad_() for name, one in projected.items()}
            for index in chosen:
                (loss(seen, index) / len(chosen)).backward()  # type: ignore[no-untyped-call]
                step_done()
            through = [name for name in seen if seen[name] is not projected[name] and seen[name].grad is not None]
            torch.autograd.backward([projected[name] for name in through], [seen[name].grad for name in through])

    before = best = mean_held_out()
    kept = {name: master.detach().clone() for name, master in masters.items()}
    best_epoch = 0
    if groups:
        adam = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: schedule_of(step, epochs * steps_per_epoch))
        generator = torch.Generator().manual_seed(0)
        for epoch in range(1, epochs + 1):
            order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
            for start in range(0, len(order), BATCH):
                adam.zero_grad()
                add_gradients(order[start : start + BATCH])
                if not revive:
                    for name, master in masters.items():
                        if master.grad is not None:
                            master.grad.mul_(masks[name])
                adam.step()
                schedule.step()
                with torch.no_grad():
                    for name, steps in gathered.items():
                        steps += masters[name] * ~masks[name]
                        masters[name] *= masks[name]
            now = mean_held_out()
            if now < best:
                best, best_epoch = now, epoch
                for name, master in masters.items():
                    kept[name].copy_(master.detach())
                    if revive:
                        kept[name] += gathered[name]
            elif epoch - best_epoch >= PATIENCE:
                break
    return kept, Fit(before, best, best_epoch)


def schedule_of(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step of `steps`."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
