"""What the dense model says of windows: its logits, and its hidden states.

Where windows are read more than once, inputs of the head are kept: for a token as many numbers as the hidden size, a
hundredth of its logits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gblm_compress.calibration.weights import StatePool
from gblm_compress.errors import UsageError
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.tasks.task import Sample, Task
from gblm_compress.training.distillation import head_of, inputs_of_head, logits_of
from gblm_compress.training.reconstruction import autocast


class Teacher:
    """The dense model.

    Args:
        model: in eval mode.
        samples: windows by number.
        asked: the numbers of those that will be asked for.
        compute: dtype of its products.
        pool: where inputs of the head are kept; None where no window comes twice, or hidden states are asked for.
        states: whether hidden states are asked for; they are not kept.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        samples: list[Sample],
        asked: Iterable[int],
        compute: str,
        pool: StatePool | None,
        states: bool,
    ) -> None:
        self._model, self._task, self._samples, self._compute = model, task, samples, compute
        self._places = {index: place for place, index in enumerate(sorted(asked))}
        self._kept = None if pool is None else pool.states(len(self._places))
        self._known: set[int] = set()
        self._states = states

    @torch.no_grad()
    def of(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The logits [windows, tokens, vocabulary], and the hidden states after each block."""
        if self._known.issuperset(indices):
            assert self._kept is not None
            kept = torch.cat([self._kept[self._places[index]] for index in indices])
            with autocast(kept.device, self._compute):
                return logits_of(self._model, self._task, self._samples[0], kept), []
        with inputs_of_head(head_of(self._model), last=False) as inputs:
            output = self._run(together([self._samples[index] for index in indices]), self._states)
        if self._kept is not None:
            states = inputs[0].to(torch.bfloat16 if self._compute == "bfloat16" else torch.float32)
            for row, index in enumerate(indices):
                self._kept[self._places[index]] = states[[row]]
            self._known |= set(indices)
        return getattr(output, self._task.output), list(output.hidden_states[1:]) if self._states else []

    def _run(self, sample: Sample, states: bool) -> Any:
        with autocast(sample["input_ids"].device, self._compute):
            return self._model(**self._task.arguments(sample), output_hidden_states=states)


def together(samples: Sequence[Sample]) -> Sample:
    """Windows of one shape as one sample [windows, tokens]."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def check_same_head(teacher: Any, student: Any, name: str) -> None:
    """Raises:
    UsageError: head or embedding of the two models are not the same numbers, in the dtype of the dense one.
    """
    for what, theirs, own in zip(
        ("head", "embedding"), head_and_embedding(teacher), head_and_embedding(student), strict=True
    ):
        one, other = (getattr(module, "weight", None) for module in (theirs, own))
        if one is None or other is None or not torch.equal(one, other.to(one.dtype)):
            shapes = " and ".join(str(list(w.shape)) if w is not None else "none" for w in (one, other))
            raise UsageError(
                f"teacher {name!r}: its {what} is not that of the pruned model ({shapes}); give the dense model that "
                "it was pruned from"
            )
