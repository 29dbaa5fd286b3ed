"""The interface of tasks, for calibration, fits, evaluation and export.

Raises DataError for a bad or short source, ModelError for an unfit processor, UsageError for a missing method.
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
Samples: TypeAlias = "list[Sample]"
BESIDE = ("labels", "draw")  # not for the model: the target, and the seed of a loss's random numbers
_WORDS = "A word, ACGT 1 слово 词"  # words, letters and digits for vocabularies of all kinds


@dataclass(frozen=True)
class Processor:
    """The part of a model that turns data into arguments: its name, and the class of transformers that loads it."""

    name: str
    auto_class: str


TOKENIZER = Processor("tokenizer", "AutoTokenizer")
IMAGE_PROCESSOR = Processor("image processor", "AutoImageProcessor")


class Task(ABC):
    """The use of a model. `docs/adding-a-task.md` lists the members that a task may override."""

    help: ClassVar[str]  # the name of such a model, with its article
    auto_class: ClassVar[str]  # the class of transformers that loads it from its config
    output: ClassVar[str] = "logits"  # the name of the prediction, in transformers and ONNX
    processor: ClassVar[Processor] = TOKENIZER
    companions: ClassVar[tuple[str, ...]] = ()  # patterns of further files that belong to the model
    generates: ClassVar[bool] = False  # token by token, with a cache
    varying_axes: ClassVar[int] = 2  # leading dimensions of a batch that vary: samples, then tokens
    sample: ClassVar[str] = "window"  # the name of one sample
    loss_unit: ClassVar[str] = "nats per token"  # of `divergence`
    reads: ClassVar[str] = text.READS  # the data that `data_files` accepts, for messages
    suffixes: ClassVar[Collection[str]] = text.FILES  # of the files among them

    def of_folder(self, folder: Path) -> Task:
        """The task with the settings from the files of a model's folder; itself if there are none."""
        return self

    def check_processor(self, processor: Any) -> None:
        """Refuse a useless processor: without a vocabulary, transformers makes a tokenizer that knows no words."""
        with text.tokenizing():
            known = set(processor(_WORDS, verbose=False)["input_ids"]) - set(processor.all_special_ids)
        if len(known) < 2:  # one may be a space, or an unknown token that is not marked as special
            raise ModelError(
                f"its tokenizer knows no word of {_WORDS!r}; its tokenizer files are missing or do not fit: copy "
                "those of the original model (for example tokenizer.json) into the folder"
            )

    def data_files(self, dataset: str) -> list[Path]:
        """The local files or folders of a dataset; empty if it is not local. Only names are checked."""
        return text.data_files(dataset, self.reads, self.suffixes)

    @abstractmethod
    def calibration(self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int) -> Samples:
        """Samples to calibrate on, all of one shape: texts are cut to `length` tokens and padded."""

    def probe(self, processor: Any, config: Any) -> Sample:
        """One sample of data that every machine has, to verify exports on."""
        return self.calibration(processor, config, "demo", samples=1, length=64, seed=0)[0]

    @abstractmethod
    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        """The scalar loss of one sample, from the result of `judged`."""

    def training(self, processor: Any, config: Any, dataset: str, length: int, tokens: int) -> Sequence[Sample]:
        """Samples to train on, in the text's order: about `tokens` tokens, or all if there are fewer."""
        raise UsageError(f"training does not support {self.help}; pruning does")

    def tokens_of(self, config: Any, length: int) -> int:
        """The most tokens that a sample has when it is cut to `length`."""
        return length

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Sequence[Sample]:
        raise UsageError(f"evaluation does not support {self.help}; pruning does")

    def measure(self, judged: Tensor, sample: Sample) -> Any:
        """The values of a sample that `metrics` needs: its loss by default."""
        return float(self.loss(judged, sample))

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        """The metrics, from the results of `measure` for all samples; the first is the main one."""
        return {"loss": mean_metric(measured)}

    def fidelity(self, reference: Tensor, judged: Tensor) -> dict[str, float]:
        """Similarity of a sample's judged predictions to the dense model's; both [positions, classes]."""
        return {"mean_kl": mean_kl(reference, judged), "top1_agreement": top1_agreement(reference, judged)}

    def divergence(self, dense: Tensor, judged: Tensor) -> Tensor:
        """The loss of distillation, a differentiable scalar: KL(dense ‖ judged) in nats per position by default."""
        from gblm_compress.methods.divergence import kl_divergence

        return kl_divergence(judged, dense)

    def agreement(self, dense: Sequence[Any], measured: Sequence[Any]) -> dict[str, float]:
        """Similarity to the dense model over all samples together, from the results of `measure` for both."""
        return {}

    def judged_values(self, config: Any, length: int) -> int:
        """The most numbers that are judged in a sample of `length` tokens."""
        return length * int(config.get_text_config().hidden_size)

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        """Arguments [batch, …] of the forward pass that a benchmark times, for a task that generates nothing."""
        raise UsageError(f"benchmark does not support {self.help}; pruning does")

    def example(self, config: Any) -> Sample:
        """Arguments for tracing a model for ONNX: two samples, the first padded."""
        raise UsageError(f"{self.help} cannot be exported to ONNX; export to a sparse PyTorch format")

    def arguments(self, sample: Sample) -> dict[str, Any]:
        return {name: tensor for name, tensor in sample.items() if name not in BESIDE}

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """The judged part [positions, …] of a prediction [1, tokens, …]: all tokens but padding."""
        mask = sample.get("attention_mask")
        return prediction[0] if mask is None else prediction[mask.bool()]

    def loss_gradient(self, predict: Callable[[Sample, Tensor], Tensor], sample: Sample, hidden: Tensor) -> Tensor:
        """The gradient with respect to the last block's output `hidden` [1, tokens, hidden size]."""
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
    """The samples, each with its own seed, for a loss that draws random numbers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 1 << 62, (len(samples),), generator=generator)
    return [{**sample, "draw": seed.unsqueeze(0)} for sample, seed in zip(samples, seeds, strict=True)]


def random_numbers(sample: Sample, count: int, *, normal: bool) -> Tensor:
    """Numbers [count] from a sample's seed, in float32 on the CPU: of N(0, 1), or uniform in [0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(int(sample["draw"]) if "draw" in sample else 0)
    return (torch.randn if normal else torch.rand)(count, generator=generator)


def on_device(sample: Sample, device: Any) -> Sample:
    return {name: tensor.to(device) for name, tensor in sample.items()}
