"""Classification of texts, alone or in pairs, and the base class of classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from gblm_compress.errors import DataError, ModelError
from gblm_compress.tasks import passages
from gblm_compress.tasks.metrics import Metric, mean_metric
from gblm_compress.tasks.passages import PassageTask, Row
from gblm_compress.tasks.task import Sample, Samples, Task, random_numbers

if TYPE_CHECKING:
    from torch import Tensor


class Classes(Task):
    """A task whose prediction is logits [1, classes], and whose samples may have "labels" [1].

    The loss is the cross-entropy of the label. A missing label is drawn from the model's own prediction: the squared
    gradients then estimate the diagonal of the Fisher information.
    """

    loss_unit = "nats per sample"
    accuracies: ClassVar[Mapping[str, int]] = {"accuracy": 1}  # metric: top-k

    def judged_values(self, config: Any, length: int) -> int:
        return int(config.num_labels)

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        return prediction

    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(judged.float(), sample["labels"] if "labels" in sample else drawn_label(judged, sample))

    def measure(self, judged: Tensor, sample: Sample) -> tuple[float, ...] | None:
        """The `accuracies` and the cross-entropy; None without a label."""
        if "labels" not in sample:
            return None
        likeliest = judged[0].topk(min(max(self.accuracies.values()), judged.shape[-1])).indices == sample["labels"]
        right = (float(likeliest[:count].any()) for count in self.accuracies.values())
        return *right, float(self.loss(judged, sample))

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        if measured[0] is None:
            return {}
        names = (*self.accuracies, "cross_entropy")
        return {name: mean_metric(values) for name, values in zip(names, zip(*measured, strict=True), strict=True)}


class Classification(Classes, PassageTask):
    """Samples are rows of a table with texts, or passages; labels are read if the data has them."""

    help = "a model that classifies texts"
    auto_class = "AutoModelForSequenceClassification"

    def samples(self, processor: Any, config: Any, rows: Sequence[Row], length: int, pad: bool) -> Samples:
        if config.num_labels < 2:
            raise ModelError("the model has a single output; a classifier has at least two classes")
        scored = any(row.label is None and row.score is not None for row in rows)  # integer scores are not classes
        labelled = any(row.label is not None for row in rows) and not scored
        labels = [class_of(row.label, row.where, config) for row in rows] if labelled else []
        found = super().samples(processor, config, rows, length, pad)
        if not labels:
            return found
        numbered = zip(found, labels, strict=True)
        return [{**sample, "labels": sample["input_ids"].new_tensor([label])} for sample, label in numbered]

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Samples:
        return self.samples(processor, config, passages.read(dataset, "evaluation")[:limit], length, pad=False)


def class_of(label: int | str | None, where: str, config: Any, names: Mapping[str, int] | None = None) -> int:
    """The number of a class, from its number or name. `names` are lower-case, and the model's by default."""
    if label is None:
        raise DataError(f"{where} has no label, but other samples have one; label all samples, or none")
    names = names_of(config) if names is None else names
    if isinstance(label, str) and label.lower() not in names and label.isdecimal():
        label = int(label)
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    if (number := names.get(str(label).lower())) is not None:
        return number
    first = ", ".join(str(config.id2label[number]) for number in sorted(config.id2label)[:8])
    raise DataError(
        f"{where}: the label {label!r} is not one of the model's {config.num_labels}; give a number from 0 to "
        f"{config.num_labels - 1}, or a name: {first}"
    )


def names_of(config: Any) -> dict[str, int]:
    return {str(name).lower(): int(number) for number, name in config.id2label.items()}


def drawn_label(logits: Tensor, sample: Sample) -> Tensor:
    """A class [1] drawn from softmax(logits [1, classes]), the same for the same sample."""
    likelihoods = logits.detach().double().softmax(-1).cumsum(-1)
    number = random_numbers(sample, 1, normal=False).to(likelihoods)
    return (likelihoods < number).sum(-1).clamp_(max=logits.shape[-1] - 1)
