"""How far the student is from the dense model on windows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gblm_compress.pruning.reconstruction import autocast
from gblm_compress.recovery.teacher import Teacher, together
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

    def divergence(self, indices: Sequence[int]) -> Tensor:
        """KL(dense ‖ student) in nats per token, the mean over windows, which go through the network together."""
        return torch.stack([self._task.divergence(dense, own) for own, dense in self._both(indices)[0]]).mean()

    def training(self, indices: Sequence[int]) -> Tensor:
        """What is minimised, the mean over windows: the divergence, mixed with the loss of the text and the error of
        hidden states where the settings weigh them."""
        settings = self._settings
        judged, states = self._both(indices)
        losses = []
        for index, (own, dense) in zip(indices, judged, strict=True):
            loss = self._task.divergence(dense, own)
            if settings.text_weight:
                text = self._task.loss(own.float(), self._samples[index])
                loss = (1 - settings.text_weight) * loss + settings.text_weight * text
            losses.append(loss)
        errors = [
            (own.float() - dense.float()).square().mean() / dense.float().square().mean() for own, dense in states
        ]
        total = torch.stack(losses).mean()
        return total + settings.hidden_weight * torch.stack(errors).mean() if errors else total

    def _both(self, indices: Sequence[int]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """What is judged of the student and of the dense model for each window; and the hidden states of both."""
        dense, states = self._teacher.of(indices)
        samples = [self._samples[index] for index in indices]
        arguments = self._task.arguments(together(samples)) | {"output_hidden_states": bool(states)}
        with autocast(dense.device, self._settings.fit_dtype):
            output = self._student(**arguments)
        # Taken apart at once: a gradient for a slice of the logits would be filled up to all of them.
        own = getattr(output, self._task.output).unbind()
        judged = [
            (self._task.judged(one[None], sample), self._task.judged(other[None], sample))
            for one, other, sample in zip(own, dense, samples, strict=True)
        ]
        return judged, list(zip(output.hidden_states[1:], states, strict=True)) if states else []
