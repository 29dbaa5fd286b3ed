"""The dense model's predictions, and the loss of a pruned model towards them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gblm_compress.calibration.calls import ForwardEnded
from gblm_compress.calibration.weights import HiddenStates, StatePool
from gblm_compress.errors import UsageError
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.tasks.task import BESIDE, Sample, Task, on_device


@torch.no_grad()
def prediction(model: nn.Module, task: Task, samples: Sequence[Sample]) -> Tensor:
    """The judged outputs of the dense model [samples, positions, …].

    With a head, its inputs [samples, tokens, hidden size]: far less than logits.
    """
    head, sample = head_and_embedding(model)[0], together(samples)
    if head is None:
        outputs = getattr(model(**task.arguments(sample)), task.output)
        return torch.stack([task.judged(*each) for each in zip(outputs.split(1), samples, strict=True)])

    reached: list[Tensor] = []

    def end(head: nn.Module, args: tuple[Tensor, ...]) -> None:
        reached.append(args[0])
        raise ForwardEnded

    with head.register_forward_pre_hook(end), suppress(ForwardEnded):
        model(**task.arguments(sample))
    return reached[0]


class Teacher:
    """The dense model during a training."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        samples: Sequence[Sample],
        asked: Iterable[int],  # numbers of the samples that will be asked for
        compute: str,  # dtype of products
        pool: StatePool | None,  # None to keep no predictions
    ) -> None:
        self._model, self._task, self._samples, self._compute = model, task, samples, compute
        self._dtype = torch.float32 if head_and_embedding(model)[0] is None else getattr(torch, compute)
        self._places = {index: place for place, index in enumerate(sorted(asked))}
        self._kept = None if pool is None else HiddenStates(pool, len(self._places))
        self._known: set[int] = set()

    def predictions(self, indices: Sequence[int]) -> Tensor:
        """As `prediction`."""
        if self._kept is not None and self._known.issuperset(indices):
            return torch.cat([self._kept[self._places[index]] for index in indices])
        device = next(self._model.parameters()).device
        with autocast(device, self._compute):
            states = prediction(self._model, self._task, padded(self._samples, indices, device)).to(self._dtype)
        if self._kept is not None:
            for row, index in enumerate(indices):
                self._kept[self._places[index]] = states[[row]]
            self._known.update(indices)
        return states


class Imitation:
    """The loss of a pruned model, with the dense model's head, towards the dense model's predictions."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        samples: Sequence[Sample],
        dense: Callable[[Sequence[int]], Tensor],  # numbers of samples -> their `prediction`, concatenated
        compute: str,  # dtype of products
    ) -> None:
        self.model, self.samples, self._task, self._dense = model, samples, task, dense
        self._compute = compute
        self._head = head_and_embedding(model)[0]
        self._head_is_last = self._head is not None and self._ends_with(self._head)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """The mean loss of samples; nats per token for a language model."""
        dense = self._dense(indices)
        samples = padded(self.samples, indices, dense.device)
        with autocast(dense.device, self._compute):
            own, target = self._outputs(together(samples), dense)
        # `unbind`, because the gradient of a slice of the logits would be padded to all of them.
        losses = []
        for own_one, dense_one, sample in zip(own.unbind(), target.unbind(), samples, strict=True):
            judged = dense_one if self._head is None else self._task.judged(dense_one[None], sample)
            losses.append(self._task.divergence(judged, self._task.judged(own_one[None], sample)))
        return torch.stack(losses).mean()

    def _outputs(self, sample: Sample, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the pruned and the dense model [samples, …]."""
        head = self._head
        if head is None:
            return self._run(sample), dense
        if self._head_is_last:
            own = self._run(sample)
            with torch.no_grad():
                return own, head.forward(dense.to(head.get_parameter("weight").dtype))

        def add_dense(head: nn.Module, args: tuple[Tensor, ...], own: Tensor) -> Tensor:
            with torch.no_grad():
                target = head.forward(dense.to(args[0].dtype))
            return torch.cat([own, target])

        with head.register_forward_hook(add_dense):  # a scale or a cap after the head applies to both
            both = self._run(sample)
        return both[: len(dense)], both[len(dense) :].detach()

    def _run(self, sample: Sample) -> Tensor:
        output: Tensor = getattr(self.model(**self._task.arguments(sample)), self._task.output)
        return output

    @torch.no_grad()
    def _ends_with(self, head: nn.Module) -> bool:
        """Whether no scale or cap follows the head."""
        found: list[Tensor] = []
        device = head.get_parameter("weight").device
        sample = {name: tensor[:, :1].to(device) for name, tensor in self.samples[0].items()}
        with autocast(device, self._compute), head.register_forward_hook(lambda head, args, own: found.append(own)):
            return self._run(sample) is found[-1]


def padded(samples: Sequence[Sample], indices: Sequence[int], device: torch.device) -> list[Sample]:
    """Some samples on a device, texts padded on the right to the longest of them."""
    found = [on_device(samples[index], device) for index in indices]
    if "attention_mask" not in found[0]:
        return found
    longest = max(each["attention_mask"].shape[1] for each in found)
    return [
        {name: pad(one, (0, longest - one.shape[1])) if one.dim() == 2 else one for name, one in each.items()}
        for each in found
    ]


def together(samples: Sequence[Sample]) -> Sample:
    """The model's arguments [samples, …], of samples of one shape."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0] if name not in BESIDE}


def autocast(device: torch.device, compute: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == "bfloat16")


def check_same_head(teacher: Any, student: Any, name: str) -> None:
    """Raise UsageError unless head and embedding, where the model has them, are equal in the dense model's dtype."""
    for what, theirs, own in zip(
        ("head", "embedding"), head_and_embedding(teacher), head_and_embedding(student), strict=True
    ):
        one, other = (getattr(module, "weight", None) for module in (theirs, own))
        if one is None and other is None:
            continue
        if one is None or other is None or not torch.equal(one, other.to(one.dtype)):
            shapes = " and ".join(str(list(w.shape)) if w is not None else "none" for w in (one, other))
            raise UsageError(
                f"teacher {name!r}: its {what} is not that of the pruned model ({shapes}); give the dense model that "
                "it was pruned from"
            )
