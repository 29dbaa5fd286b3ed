"""Classification of texts, alone or in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import DataError, ModelError
from gblm_compress.tasks import passages
from gblm_compress.tasks.classes import Classes
from gblm_compress.tasks.passages import PassageTask
from gblm_compress.tasks.tables import Row
from gblm_compress.tasks.task import Sample, with_draws

if TYPE_CHECKING:
    from torch import Tensor


class Classification(Classes, PassageTask):
    """Samples are rows of a table with texts, or passages; labels are read where the data has them."""

    help = "a model that classifies texts"
    optimum = "text-classification"
    auto_class = "AutoModelForSequenceClassification"

    def calibration(
        self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int
    ) -> list[Sample]:
        rows = passages.drawn(passages.read(dataset, "calibration"), samples, seed, dataset)
        return with_draws(self._samples(processor, config, rows, length, pad=True), seed)

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> list[Sample]:
        rows = passages.read(dataset, "evaluation")[:limit]
        return self._samples(processor, config, rows, length, pad=False)

    def _samples(self, processor: Any, config: Any, rows: Sequence[Row], length: int, pad: bool) -> list[Sample]:
        import torch

        if config.num_labels < 2:
            raise ModelError("the model gives one number and no classes; a classifier has two labels or more")
        scored = any(row.label is None and row.score is not None for row in rows)  # whole scores are no classes
        labelled = any(row.label is not None for row in rows) and not scored
        labels = [class_of(row, config) for row in rows] if labelled else []
        found = passages.encode(processor, config, rows, length, pad)
        if not labels:
            return found
        return [{**sample, "labels": torch.tensor([label])} for sample, label in zip(found, labels, strict=True)]

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """Logits [1, classes]."""
        return prediction


def class_of(row: Row, config: Any) -> int:
    """The number of a row's class.

    Raises:
        DataError: it has none, or one that the model does not know.
    """
    classes: dict[int, str] = config.id2label
    if row.label is None:
        raise DataError(f"{row.where} has no label, and others have one; give all rows one, or none")
    if isinstance(row.label, int) and 0 <= row.label < config.num_labels:
        return row.label
    named = {str(name).lower(): number for number, name in classes.items()}
    if (number := named.get(str(row.label).lower())) is not None:
        return int(number)
    names = ", ".join(str(classes[number]) for number in sorted(classes)[:8])
    raise DataError(
        f"{row.where}: the label {row.label!r} is none of the model's {config.num_labels}; give a number from 0 to "
        f"{config.num_labels - 1}, or a name: {names}"
    )
