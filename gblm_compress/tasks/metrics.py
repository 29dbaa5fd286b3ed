"""Metrics of a task, and similarity of two predictions: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A measured value with its standard error, from the spread over the samples; None for a single sample."""

    value: float
    error: float | None = None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def variance_of_mean(values: Sequence[float]) -> float:
    """The square of the mean's standard error, of two values or more."""
    middle = mean(values)
    return sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values)


def mean_metric(values: Sequence[float]) -> Metric:
    return Metric(mean(values), math.sqrt(variance_of_mean(values)) if len(values) > 1 else None)


def perplexity(cross_entropy: Metric) -> Metric:
    """exp of a mean cross-entropy in nats; its error by the delta method."""
    value = math.exp(cross_entropy.value) if cross_entropy.value < 700 else math.inf
    return Metric(value, None if cross_entropy.error is None else value * cross_entropy.error)


def spearman(values: Sequence[float], scores: Sequence[float]) -> Metric:
    """Spearman's rank correlation ρ, ties at their mean rank; NaN if all values or all scores are equal.

    The error is by the delta method from Fisher's z; its variance is (1 + ρ²/2) / (n - 3) (Bonett and Wright 2000).
    """
    count, vary = len(values), len(set(values)) > 1 and len(set(scores)) > 1
    value = statistics.correlation(_ranks(values), _ranks(scores)) if vary else math.nan
    return Metric(value, (1 - value**2) * math.sqrt((1 + value**2 / 2) / (count - 3)) if count > 3 else None)


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Mean over positions of KL(softmax(reference) ‖ softmax(logits)) in nats; both [positions, classes]."""
    from torch.nn.functional import kl_div

    return float(kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True))


def top1_agreement(reference: Tensor, logits: Tensor) -> float:
    """Fraction of positions with the same most probable class; both [positions, classes]."""
    return float((reference.argmax(-1) == logits.argmax(-1)).double().mean())
