"""How far the student is from the dense model on a window."""

from typing import Any

import torch
from torch import Tensor

from gblm_compress.pruning.distillation import beside, head_of
from gblm_compress.pruning.reconstruction import autocast
from gblm_compress.recovery.teacher import Teacher
from gblm_compress.settings import RecoverSettings
from gblm_compress.tasks.task import Sample, Task


class Losses:
    """The losses of a student, with the weights that it has.

    Args:
        samples: all windows, by number.
    """

    def __init__(
        self, student: Any, task: Task, teacher: Teacher, samples: list[Sample], settings: RecoverSettings
    ) -> None:
        self._student, self._task, self._teacher = student, task, teacher
        self._samples, self._settings = samples, settings

    def divergence(self, index: int) -> Tensor:
        """KL(dense ‖ student) of a window, in nats per token."""
        judged, target, *_ = self._both(index)
        return self._task.divergence(target, judged)

    def training(self, index: int) -> Tensor:
        """What is minimised: the divergence, mixed with the loss of the text and the error of hidden states where the
        settings weigh them."""
        settings, sample = self._settings, self._samples[index]
        judged, target, own, theirs = self._both(index)
        loss = self._task.divergence(target, judged)
        if settings.text_weight:
            loss = (1 - settings.text_weight) * loss + settings.text_weight * self._task.loss(judged.float(), sample)
        if theirs:
            errors = [
                (state.float() - goal.float()).square().mean() / goal.float().square().mean()
                for state, goal in zip(own, theirs, strict=True)
            ]
            loss = loss + settings.hidden_weight * torch.stack(errors).mean()
        return loss

    def _both(self, index: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """What is judged of the student and of the dense model, and the hidden states of both."""
        sample = self._samples[index]
        inputs, states = self._teacher.of(index)
        arguments = self._task.arguments(sample) | {"output_hidden_states": bool(states)}
        with autocast(inputs.device, self._settings.fit_dtype), beside(head_of(self._student), inputs):
            output = self._student(**arguments)
        own, dense = getattr(output, self._task.output)
        judged, target = (self._task.judged(one[None], sample) for one in (own, dense))
        return judged, target.detach(), list(output.hidden_states[1:]) if states else [], states
