"""What all classifiers share, of texts and images: losses with labels and without, accuracy, fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gblm_compress.tasks.metrics import Metric, mean_metric
from gblm_compress.tasks.task import Sample, Task, random_numbers

if TYPE_CHECKING:
    from torch import Tensor


class Classes(Task):
    """A task whose prediction is logits [1, classes], and whose samples may have "labels" [1].

    The loss is the cross-entropy of the label. Without one a label is drawn from the model's own prediction, for the
    divergence from its own prediction has no gradient; the squared gradients then estimate the diagonal of the Fisher
    information, which is that divergence's curvature.
    """

    def judged_values(self, config: Any, length: int) -> int:
        return int(config.num_labels)

    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(judged.float(), sample["labels"] if "labels" in sample else drawn_label(judged, sample))

    def measure(self, judged: Tensor, sample: Sample) -> tuple[float, ...] | None:
        """Whether the likeliest class is the label, and the cross-entropy; None without a label."""
        if "labels" not in sample:
            return None
        return float(judged.argmax(-1) == sample["labels"]), float(self.loss(judged, sample))

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        """Accuracy and cross-entropy; nothing where there are no labels."""
        if measured[0] is None:
            return {}
        right, losses = zip(*measured, strict=True)
        return {"accuracy": mean_metric(right), "cross_entropy": mean_metric(losses)}


def drawn_label(logits: Tensor, sample: Sample) -> Tensor:
    """A class [1] drawn from softmax(logits [1, classes]), the same for the same sample."""
    likelihoods = logits.detach().double().softmax(-1).cumsum(-1)
    number = random_numbers(sample, 1, normal=False).to(likelihoods)
    return (likelihoods < number).sum(-1).clamp_(max=logits.shape[-1] - 1)
