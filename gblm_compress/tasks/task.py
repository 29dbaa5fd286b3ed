"""The interface through which calibration, fits, evaluation and export know what a model is for.

A bad or short source raises DataError, a processor that does not fit the model ModelError, a missing method UsageError.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.tasks import text
from gblm_compress.tasks.metrics import Metric, mean_kl, mean_metric, top1_agreement

if TYPE_CHECKING:
    from torch import Tensor

Sample: TypeAlias = "Mapping[str, Tensor]"  # the model's arguments, each [1, …], and any of `BESIDE`
BESIDE = ("labels", "draw")  # no arguments of the model: the target, and the seed of whatever a loss draws
_WORDS = "A word, ACGT 1 слово 词"  # in the words, letters and digits of all sorts of vocabularies


@dataclass(frozen=True)
class Processor:
    """The part of a model's folder that turns data into arguments: its name, and the class that loads it."""

    name: str
    auto_class: str


TOKENIZER = Processor("tokenizer", "AutoTokenizer")
IMAGE_PROCESSOR = Processor("image processor", "AutoImageProcessor")


class Task(ABC):
    """What a model is for. `docs/adding-a-task.md` lists what a task may override."""

    help: ClassVar[str]  # such a model, with its article
    auto_class: ClassVar[str]  # the class of transformers that loads it from its config
    output: ClassVar[str] = "logits"  # the output that is its prediction, in transformers and ONNX
    processor: ClassVar[Processor] = TOKENIZER
    companions: ClassVar[tuple[str, ...]] = ()  # patterns of further files that belong to the model
    generates: ClassVar[bool] = False  # token by token, with a cache
    varying_axes: ClassVar[int] = 2  # how many first dimensions of a batch vary: samples and their tokens
    sample: ClassVar[str] = "window"  # the name of one sample
    loss_unit: ClassVar[str] = "nats per token"  # of `divergence`
    reads: ClassVar[str] = text.READS  # what `data_files` takes, for messages
    suffixes: ClassVar[Collection[str]] = text.FILES  # of the files that it takes

    def of_folder(self, folder: Path) -> Task:
        """The task with the settings that the files of a model's folder give; itself where there are none."""
        return self

    def check_processor(self, processor: Any) -> None:
        """Refuse a processor of no use: without its vocabulary, transformers makes a tokenizer that knows no words."""
        with text.tokenizing():
            known = set(processor(_WORDS, verbose=False)["input_ids"]) - set(processor.all_special_ids)
        if len(known) < 2:  # one may be a space, or an unknown token that is not marked as special
            raise ModelError(
                f"its tokenizer knows no word of {_WORDS!r}; its tokenizer files are missing or do not fit: put those "
                "of the original model (tokenizer.json, say) into the folder"
            )

    def data_files(self, dataset: str) -> list[Path]:
        """The local files or folders of a dataset; none where it lies elsewhere. Only names are looked at."""
        return text.data_files(dataset, self.reads, self.suffixes)

    @abstractmethod
    def calibration(
        self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int
    ) -> list[Sample]:
        """Samples to calibrate on, all of one shape: texts are cut to `length` tokens and padded."""

    def probe(self, processor: Any, config: Any) -> Sample:
        """One sample of data that every machine has, on which exports are verified."""
        return self.calibration(processor, config, "demo", samples=1, length=64, seed=0)[0]

    @abstractmethod
    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        """The loss of one sample, a scalar; `judged` as the method of that name gives it."""

    def training(self, processor: Any, config: Any, dataset: str, length: int, tokens: int) -> Sequence[Sample]:
        """Samples to train on, in the order of the text, of one shape: about so many tokens, or all there are."""
        raise UsageError(f"there is no training of {self.help}; models of its kind can be pruned")

    def tokens_of(self, config: Any, length: int) -> int:
        """Tokens of a sample that is cut to `length`, at most."""
        return length

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Sequence[Sample]:
        raise UsageError(f"there is no evaluation of {self.help}; models of its kind can be pruned")

    def measure(self, judged: Tensor, sample: Sample) -> Any:
        """What `metrics` needs of a sample: its loss by default."""
        return float(self.loss(judged, sample))

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        """The metrics, from what `measure` gave for all samples; the first counts."""
        return {"loss": mean_metric(measured)}

    def fidelity(self, reference: Tensor, judged: Tensor) -> dict[str, float]:
        """How close a sample's judged predictions are to the dense model's; both [positions, classes]."""
        return {"mean_kl": mean_kl(reference, judged), "top1_agreement": top1_agreement(reference, judged)}

    def divergence(self, dense: Tensor, judged: Tensor) -> Tensor:
        """The loss of distillation, a differentiable scalar: KL(dense ‖ judged) in nats per position by default."""
        from gblm_compress.methods.divergence import kl_divergence

        return kl_divergence(judged, dense)

    def agreement(self, dense: Sequence[Any], measured: Sequence[Any]) -> dict[str, float]:
        """How close a model is to the dense one over all samples together; both as `measure` gave them."""
        return {}

    def judged_values(self, config: Any, length: int) -> int:
        """How many numbers of a sample of `length` tokens are judged, at most."""
        return length * int(config.get_text_config().hidden_size)

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        """Arguments [batch, …] for the forward pass that a benchmark times, of a task that generates nothing."""
        raise UsageError(f"there is no benchmark of {self.help}; models of its kind can be pruned")

    def example(self, config: Any) -> Sample:
        """The arguments with which a model is traced for ONNX: two samples, the first padded."""
        raise UsageError(f"{self.help} cannot be exported to ONNX; export to a sparse PyTorch format")

    def arguments(self, sample: Sample) -> dict[str, Any]:
        return {name: tensor for name, tensor in sample.items() if name not in BESIDE}

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """The part of a prediction [1, tokens, …] that is judged, [positions, …]: all tokens that are no padding."""
        mask = sample.get("attention_mask")
        return prediction[0] if mask is None else prediction[mask.bool()]

    def loss_gradient(self, predict: Callable[[Sample, Tensor], Tensor], sample: Sample, hidden: Tensor) -> Tensor:
        """The gradient to the last block's output `hidden` [1, tokens, hidden size]; `predict(sample, hidden)`."""
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
    """Numbers [count] of a sample's "draw", in float32 on the CPU: of N(0, 1), or uniform in [0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(int(sample["draw"]) if "draw" in sample else 0)
    return (torch.randn if normal else torch.rand)(count, generator=generator)


def on_device(sample: Sample, device: Any) -> Sample:
    return {name: tensor.to(device) for name, tensor in sample.items()}
