"""The interface through which calibration, fits, evaluation and export know what a model is for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.tasks import text
from gblm_compress.tasks.metrics import Metric, mean_kl, mean_metric, top1_agreement

if TYPE_CHECKING:
    from torch import Tensor

Sample: TypeAlias = "Mapping[str, Tensor]"
"""One sample by the names of the model's arguments, each tensor [1, …]; beside them may be `BESIDE`."""

BESIDE = ("labels", "draw")
"""What is no argument of the model: what should be predicted, and the seed of whatever a loss draws."""


_WORDS = "A word, ACGT 1 слово 词"  # in the words, letters and digits of all sorts of vocabularies


@dataclass(frozen=True)
class Processor:
    """What turns data into the arguments of a model, and lies in its folder.

    Attributes:
        name: what it is called in messages.
        auto_class: the class of transformers that loads it.
    """

    name: str
    auto_class: str


TOKENIZER = Processor("tokenizer", "AutoTokenizer")
IMAGE_PROCESSOR = Processor("image processor", "AutoImageProcessor")


class Task(ABC):
    """What a model is for.

    Attributes:
        help: what such a model is, with its article.
        optimum: what optimum's TasksManager calls the task of such a model's class.
        auto_class: the class of transformers that loads the model from its config.
        output: the field of the model's output, and output of an ONNX graph, that is its prediction.
        processor: what turns data into samples.
        companions: patterns of files that lie in a model's folder beside weights, config and processor, and go with
            the model wherever it is written.
        generates: whether the model generates tokens one by one, with a cache; all others are timed by their forward
            pass, and run in torch and ONNX Runtime alone.
        varying_axes: how many of the first dimensions of a batch vary: the samples, and their tokens.
        sample: what one sample is called.
        reads: what `data_files` takes, for messages.
    """

    help: ClassVar[str]
    optimum: ClassVar[str]
    auto_class: ClassVar[str]
    output: ClassVar[str] = "logits"
    processor: ClassVar[Processor] = TOKENIZER
    companions: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = False
    varying_axes: ClassVar[int] = 2
    sample: ClassVar[str] = "window"
    reads: ClassVar[str] = text.READS

    def of_folder(self, folder: Path) -> Task:
        """The task as the files of a model's folder say it is to be done; where they say nothing, itself.

        Raises:
            ModelError: they say what is not supported, or are damaged.
        """
        return self

    def check_processor(self, processor: Any) -> None:
        """Raises:
        ModelError: the processor is of no use: where the files of the vocabulary are missing, transformers makes a
            tokenizer that knows no words.
        """
        known = set(processor(_WORDS, verbose=False)["input_ids"]) - set(processor.all_special_ids)
        if len(known) < 2:  # one may be a space, or an unknown token that is not marked as special
            raise ModelError(
                f"its tokenizer knows no word of {_WORDS!r}; its tokenizer files are missing or do not fit: put those "
                "of the original model (tokenizer.json, say) into the folder"
            )

    def data_files(self, dataset: str) -> list[Path]:
        """The files or folders of this machine that a dataset is; none where it is elsewhere, or made.

        It looks at names alone, loads no torch, and asks nothing of the hub.

        Raises:
            DataError: it names what is not there, or what this task cannot read.
        """
        return text.data_files(dataset)

    @abstractmethod
    def calibration(
        self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int
    ) -> list[Sample]:
        """Samples to calibrate on, all of one shape: shorter ones are padded.

        Args:
            processor: of the kind that `processor` names.
            config: of the model, as transformers has it.
            dataset: SRC; `data_files` accepts it.
            samples: how many.
            length: tokens in each at most, for models of text.
            seed: of whatever is drawn.

        Raises:
            DataError: the source cannot be read, or holds too little.
            ModelError: model and processor do not fit.
        """

    def probe(self, processor: Any, config: Any) -> Sample:
        """One sample of data that every machine has, on which exports are verified.

        Raises:
            ModelError: model and processor do not fit.
        """
        return self.calibration(processor, config, "demo", samples=1, length=64, seed=0)[0]

    @abstractmethod
    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        """The loss of one sample, a scalar.

        Args:
            judged: as `judged` gives it.
        """

    def training(self, processor: Any, config: Any, dataset: str, length: int, tokens: int) -> list[Sample]:
        """Samples to train on, in the order of the text and all of one shape: about so many tokens, or all there are.

        Raises:
            UsageError: models of this task are not trained.
            DataError, ModelError: as `calibration`.
        """
        raise UsageError(f"there is no training of {self.help}; recover a pruned causal language model")

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Sequence[Sample]:
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

    def divergence(self, dense: Tensor, judged: Tensor) -> Tensor:
        """How far what is judged of a sample is from the dense model's, differentiable, a scalar: what distillation
        makes small. KL(dense ‖ judged) in nats per position, unless a task says otherwise.
        """
        from gblm_compress.methods.divergence import kl_divergence

        return kl_divergence(judged, dense)

    def agreement(self, dense: Sequence[Any], measured: Sequence[Any]) -> dict[str, float]:
        """How close a model is to the dense one where that takes all samples together; both as `measure` gave them."""
        return {}

    def judged_values(self, config: Any, length: int) -> int:
        """How many numbers of a sample's prediction are judged, at most; samples are of `length` tokens."""
        return length * int(config.get_text_config().hidden_size)

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        """Arguments [batch, …] for the forward pass that a benchmark times, of a task that generates nothing.

        Args:
            length: tokens in each, for models of text.

        Raises:
            UsageError: there is no benchmark of this task.
        """
        raise UsageError(f"there is no benchmark of {self.help}; models of its kind can be pruned")

    def example(self, config: Any) -> Sample:
        """The arguments with which a model is traced for ONNX: two samples, of which the first is padded.

        Raises:
            UsageError: there is no ONNX export of this task.
        """
        raise UsageError(f"{self.help} cannot be exported to ONNX; export to a sparse PyTorch format")

    def arguments(self, sample: Sample) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        return {name: tensor for name, tensor in sample.items() if name not in BESIDE}

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
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_draws(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The samples, each with a seed of its own, for a loss that draws something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 1 << 62, (len(samples),), generator=generator)
    return [{**sample, "draw": seed.unsqueeze(0)} for sample, seed in zip(samples, seeds, strict=True)]


def random_numbers(sample: Sample, count: int, *, normal: bool) -> Tensor:
    """Numbers [count] that belong to a sample, in float32 on the CPU: of N(0, 1), or uniform in [0, 1).

    Those of samples without "draw" are all of one seed.
    """
    import torch

    generator = torch.Generator().manual_seed(int(sample["draw"]) if "draw" in sample else 0)
    return (torch.randn if normal else torch.rand)(count, generator=generator)


def on_device(sample: Sample, device: Any) -> Sample:
    """The sample with its tensors on a device."""
    return {name: tensor.to(device) for name, tensor in sample.items()}
