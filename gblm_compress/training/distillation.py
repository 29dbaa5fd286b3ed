"""Distillation: all surviving weights fitted at once, so that the pruned model predicts what the dense one does."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gblm_compress.calibration.blocks import only_requires_grad
from gblm_compress.errors import ModelError
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.progress import Progress
from gblm_compress.tasks.task import Sample, Task
from gblm_compress.training.fitting import Fit, fit
from gblm_compress.training.masters import Masters
from gblm_compress.training.reconstruction import autocast


class _HeadReached(Exception):
    """Ends a forward pass once the input of the head is known."""


@torch.no_grad()
def predictions(model: nn.Module, task: Task, samples: Sequence[Sample], progress: Progress) -> list[Tensor]:
    """What of the model's prediction is judged for every sample. Where a head makes logits over a vocabulary of it,
    what goes into the head, [1, length, hidden size]: a hundredth of the size, and the head is never pruned.
    """
    head, found = head_and_embedding(model)[0], list[Tensor]()
    if head is None:
        for sample in progress.track(samples, "dense predictions", unit="samples"):
            found.append(task.judged(getattr(model(**task.arguments(sample)), task.output), sample))
        return found

    for sample in progress.track(samples, "dense predictions", unit="samples"):
        with inputs_of_head(head, last=True) as inputs:
            model(**task.arguments(sample))
        found += inputs
    return found


def distil_(
    model: nn.Module,
    layers: dict[str, nn.Module],
    task: Task,
    samples: Sequence[Sample],
    teacher: Sequence[Tensor],
    *,
    epochs: int,
    rate: float,
    compute: str,
    progress: Progress,
    grids: Mapping[str, Grid] | None = None,
) -> tuple[Fit, dict[str, Grid]]:
    """Fit the surviving weights of all layers by Adam, in place: the loss is `Task.divergence` of the dense model's
    predictions and the pruned one's, over counted tokens.

    Args:
        model: the pruned model.
        layers: {full name: pruned layer}.
        task: what the model is for.
        samples: its samples.
        teacher: `predictions` of the dense model for the same samples.
        epochs, rate, compute, grids: as for `reconstruction.reconstruct_`.

    Returns:
        The mean divergence on held-out samples, before and after; and the grids, with their scales fitted.
    """
    head = head_and_embedding(model)[0]
    grids = grids or {}
    masters = Masters(
        {f"{name}.weight": layer for name, layer in layers.items()},
        {f"{name}.weight": grid for name, grid in grids.items()},
    )

    def loss(seen: dict[str, Tensor], index: int) -> Tensor:
        student = masters.for_products(seen, compute)
        sample = samples[index]
        with autocast(teacher[index].device, compute):
            predicted = getattr(functional_call(model, student, kwargs=task.arguments(sample)), task.output)
            target = teacher[index] if head is None else logits_of(model, task, sample, teacher[index])
        if head is None:
            return task.divergence(target, task.judged(predicted, sample))
        counted = task.counted(sample)
        own, dense = (logits[0] if counted is None else logits[counted] for logits in (predicted, target))
        return task.divergence(dense, own)

    with only_requires_grad(model, []), progress.counter("distilling", "samples", epochs * len(samples)) as advance:
        fitted, result = fit(
            masters.start, loss, len(samples), epochs=epochs, rate=rate, project=masters.seen, step_done=advance
        )
    written = masters.write_(fitted)
    return result, {name: written[f"{name}.weight"] for name in grids}


@contextmanager
def inputs_of_head(head: nn.Module, last: bool) -> Iterator[list[Tensor]]:
    """Collect what goes into the head.

    Args:
        last: end the forward pass there, and with it what is inside this context.
    """
    found: list[Tensor] = []

    def note(head: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        if last:
            raise _HeadReached

    hook = head.register_forward_pre_hook(note)
    try:
        yield found
    except _HeadReached:
        return
    finally:
        hook.remove()


@torch.no_grad()
def logits_of(model: nn.Module, task: Task, sample: Sample, inputs: Tensor) -> Tensor:
    """The logits for inputs of the head, and whatever the model does to them behind it, such as a scale or a cap: a
    forward pass of one token, in which the head is given these.

    Args:
        sample: any, of which one token is taken.
        inputs: [windows, tokens, hidden size].
    """
    one = {name: tensor[:, :1] for name, tensor in sample.items()}
    hook = head_of(model).register_forward_pre_hook(lambda head, given: (inputs.to(given[0].dtype),))
    try:
        logits: Tensor = getattr(model(**task.arguments(one)), task.output)
    finally:
        hook.remove()
    return logits


def head_of(model: nn.Module) -> nn.Module:
    """The layer that makes the logits.

    Raises:
        ModelError: the model has none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no output head; distillation needs a model that predicts tokens")
    return head
