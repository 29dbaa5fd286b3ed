"""The interface through which calibration, fits, evaluation and export know what a model is for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from gblm_compress.errors import UsageError
from gblm_compress.tasks.metrics import Metric, mean_kl, mean_metric, top1_agreement

if TYPE_CHECKING:
    from torch import Tensor

Sample: TypeAlias = "Mapping[str, Tensor]"
"""One sample by the names of the model's arguments, each tensor [1, …]; beside them may be "labels"."""


class Task(ABC):
    """What a model is for.

    Attributes:
        help: what such a model is, with its article.
        optimum: what optimum's TasksManager calls the task of such a model's class.
        auto_class: the class of transformers that loads the model from its config.
        output: the field of the model's output, and output of an ONNX graph, that is its prediction.
    """

    help: ClassVar[str]
    optimum: ClassVar[str]
    auto_class: ClassVar[str]
    output: ClassVar[str] = "logits"

    @abstractmethod
    def calibration(
        self, tokenizer: Any, config: Any, dataset: str, samples: int, length: int, seed: int
    ) -> list[Sample]:
        """Samples to calibrate on, all of one shape: shorter ones are padded.

        Args:
            config: of the model, as transformers has it.
            dataset: SRC, as `text` reads it.
            samples: how many.
            length: tokens in each, padding included.
            seed: of whatever is drawn.

        Raises:
            DataError: the source cannot be read, or holds too little.
            ModelError: model and tokenizer do not fit.
        """

    @abstractmethod
    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        """The loss of one sample, a scalar.

        Args:
            judged: as `judged` gives it.
        """

    def training(self, tokenizer: Any, config: Any, dataset: str, length: int, tokens: int) -> list[Sample]:
        """Samples to train on, in the order of the text and all of one shape: about so many tokens, or all there are.

        Raises:
            UsageError: models of this task are not trained.
            DataError, ModelError: as `calibration`.
        """
        raise UsageError(f"there is no training of {self.help}; recover a pruned causal language model")

    def evaluation(self, tokenizer: Any, config: Any, dataset: str, length: int, limit: int | None) -> list[Sample]:
        """Samples to evaluate on, at most `limit`.

        Raises:
            UsageError: there is no evaluation of this task.
            DataError, ModelError: as `calibration`.
        """
        raise UsageError(f"there is no evaluation of {self.help}; models of its kind can be pruned")

    def measure(self, judged: Tensor, sample: Sample) -> Any:
        """What `metrics` needs of a sample: its loss, unless a task says otherwise."""
        return float(self.loss(judged, sample))

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        """How well the task is done, from what `measure` gave for all samples; the first counts."""
        return {"loss": mean_metric(measured)}

    def fidelity(self, reference: Tensor, judged: Tensor) -> dict[str, float]:
        """How close what is judged of a sample is to what the dense model gives there; both [positions, classes]."""
        return {"mean_kl": mean_kl(reference, judged), "top1_agreement": top1_agreement(reference, judged)}

    def example(self, config: Any) -> Sample:
        """The arguments with which a model is traced for ONNX: two samples, of which the first is padded.

        Raises:
            UsageError: there is no ONNX export of this task.
        """
        raise UsageError(f"{self.help} cannot be exported to ONNX; export to a sparse PyTorch format")

    def arguments(self, sample: Sample) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        return {name: tensor for name, tensor in sample.items() if name != "labels"}

    def counted(self, sample: Sample) -> Tensor | None:
        """Which tokens are no padding, bool [1, tokens]; None if all are counted."""
        mask = sample.get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """What of a sample's prediction [1, tokens, …] is judged, [positions, …]: all tokens that are counted."""
        counted = self.counted(sample)
        return prediction[0] if counted is None else prediction[counted]

    def loss_gradient(self, predict: Callable[[Sample, Tensor], Tensor], sample: Sample, hidden: Tensor) -> Tensor:
        """The gradient of the loss to the last block's output.

        Args:
            predict: of (a sample, the last block's output for it): the model's prediction.
            hidden: the last block's output [1, tokens, hidden size].

        Returns:
            As `hidden`.
        """
        import torch

        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            self.loss(self.judged(predict(sample, leaf), sample), sample).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over the tensors of all samples, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        for tensor in sample.values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def on_device(sample: Sample, device: Any) -> Sample:
    """The sample with its tensors on a device."""
    return {name: tensor.to(device) for name, tensor in sample.items()}
