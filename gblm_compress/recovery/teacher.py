"""What the dense model says of a window: the inputs of its head, from which its logits follow, and its hidden states.

Where windows are read more than once, inputs of the head are kept: 2 bytes times the hidden size for a token, a
hundredth of its logits.
"""

from typing import Any

import torch
from torch import Tensor

from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.errors import UsageError
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.pruning.distillation import head_of, inputs_of_head
from gblm_compress.pruning.reconstruction import autocast
from gblm_compress.tasks.task import Sample, Task


class Teacher:
    """The dense model.

    Args:
        model: in eval mode.
        samples: all windows that will be asked for, by number.
        compute: dtype of its products.
        pool: where inputs of the head are kept; None where no window comes twice.
        states: whether hidden states are asked for; they are not kept.
    """

    def __init__(
        self, model: Any, task: Task, samples: list[Sample], compute: str, pool: StatePool | None, states: bool
    ) -> None:
        self._model, self._task, self._samples, self._compute = model, task, samples, compute
        self._kept = None if pool is None or states else pool.states(len(samples))
        self._known: set[int] = set()
        self._states = states

    @torch.no_grad()
    def of(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """The inputs of the head [1, tokens, hidden size] for a window, and the hidden states after each block."""
        if index in self._known:
            assert self._kept is not None
            return self._kept[index], []
        sample, head = self._samples[index], head_of(self._model)
        with (
            inputs_of_head(head, last=not self._states) as found,
            autocast(sample["input_ids"].device, self._compute),
        ):
            output = self._model(**self._task.arguments(sample), output_hidden_states=self._states)
        if self._kept is not None:
            self._kept[index] = found[0].to(torch.bfloat16 if self._compute == "bfloat16" else torch.float32)
            self._known.add(index)
        return found[0], list(output.hidden_states[1:]) if self._states else []


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
