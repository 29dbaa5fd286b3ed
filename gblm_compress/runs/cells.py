"""What a comparison finds: a cell for each method, pattern and seed, and their means. Importing it loads no torch."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from gblm_compress.tasks.metrics import mean_metric


@dataclass(frozen=True)
class Cell:
    """One method with one pattern and one seed.

    Attributes:
        seconds, peak_memory_bytes: of pruning, loading and saving included.
        accuracy, recovery: means over the zero-shot tasks; None where none were asked for.
    """

    method: str
    pattern: str
    seed: int
    perplexity: float
    dense_perplexity: float
    mean_kl: float
    top1_agreement: float
    accuracy: float | None
    recovery: float | None
    seconds: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MethodSummary:
    """A method with a pattern over all seeds: means, with standard errors over the seeds (None for one seed)."""

    method: str
    pattern: str
    seeds: int
    perplexity: float
    perplexity_error: float | None
    mean_kl: float
    mean_kl_error: float | None
    accuracy: float | None
    recovery: float | None
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class CompareResult:
    """The whole grid; `comparison.json` is this."""

    model: str
    dense_perplexity: float
    rows: list[MethodSummary]
    cells: list[Cell]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    plot: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarise(cells: list[Cell]) -> list[MethodSummary]:
    """A summary for each method and pattern, in the order of their first cells."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.pattern), []).append(cell)
    result = []
    for (method, pattern), group in groups.items():
        perplexity = mean_metric([cell.perplexity for cell in group])
        divergence = mean_metric([cell.mean_kl for cell in group])
        result.append(
            MethodSummary(
                method=method,
                pattern=pattern,
                seeds=len(group),
                perplexity=perplexity.value,
                perplexity_error=perplexity.error,
                mean_kl=divergence.value,
                mean_kl_error=divergence.error,
                accuracy=_mean_of_known([cell.accuracy for cell in group]),
                recovery=_mean_of_known([cell.recovery for cell in group]),
                seconds=sum(cell.seconds for cell in group) / len(group),
                peak_memory_bytes=max(cell.peak_memory_bytes for cell in group),
            )
        )
    return result


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
