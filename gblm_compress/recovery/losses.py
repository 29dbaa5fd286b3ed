"""How far the student is from the dense model on windows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gblm_compress.recovery.teacher import Teacher, together
from gblm_compress.settings import RecoverSettings
from gblm_compress.tasks.task import Sample, Task
from gblm_compress.training.reconstruction import autocast


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

    def of_predictions(self, indices: Sequence[int]) -> Tensor:
        """KL(dense ‖ student) in nats per token, mixed with the cross-entropy of the text where the settings weigh it;
        the mean over windows, which go through the network together."""
        return self._both(indices)[0]

    def training(self, indices: Sequence[int]) -> Tensor:
        """What is minimised: the loss of predictions, and the error of hidden states where the settings weigh it."""
        loss, states = self._both(indices)
        errors = [
            (own.float() - dense.float()).square().mean() / dense.float().square().mean() for own, dense in states
        ]
        return loss + self._settings.hidden_weight * torch.stack(errors).mean() if errors else loss

    def _both(self, indices: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss of predictions; and the hidden states of the student and of the dense model."""
        dense, states = self._teacher.of(indices)
        samples = [self._samples[index] for index in indices]
        arguments = self._task.arguments(together(samples)) | {"output_hidden_states": bool(states)}
        with autocast(dense.device, self._settings.fit_dtype):
            output = self._student(**arguments)
        # Taken apart at once: a gradient for a slice of the logits would be filled up to all of them.
        own = getattr(output, self._task.output).unbind()
        losses, weight = [], self._settings.text_weight
        for one, other, sample in zip(own, dense, samples, strict=True):
            judged = self._task.judged(one[None], sample)
            loss = self._task.divergence(self._task.judged(other[None], sample), judged)
            losses.append((1 - weight) * loss + weight * self._task.loss(judged.float(), sample) if weight else loss)
        return torch.stack(losses).mean(), list(zip(output.hidden_states[1:], states, strict=True)) if states else []
