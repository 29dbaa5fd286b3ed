"""Gates: conditions of a recipe on what was measured, for continuous integration to pass or fail on."""

import math
from dataclasses import dataclass
from typing import Any

from gblm_compress.errors import UsageError
from gblm_compress.measure.benchmarking import NO_SPEED_UP
from gblm_compress.settings import GateSettings

MORE_IS_BETTER = ("spearman", "accuracy", "top1_accuracy")
"""Metrics of tasks of which a share is kept."""


@dataclass(frozen=True)
class GateOutcome:
    """One condition: what it is on, its limit, what was measured, and whether it holds.

    Attributes:
        low: the lower end of the interval of what was measured, which a speed gate is held against; None for others.
    """

    gate: str
    subject: str
    limit: float
    measured: float
    passed: bool
    low: float | None = None


def check_gates(
    gates: GateSettings, evaluation: dict[str, Any] | None, measurements: list[dict[str, Any]]
) -> list[GateOutcome]:
    """Hold every set gate against the results.

    Args:
        evaluation: of the pruned model (`EvaluateResult.as_dict`), with its baseline.
        measurements: of the benchmark (`Measurement` as plain values). A speed gate holds, for each batch size, where
            the lower end of the speed-up's interval reaches the limit: that of the artefact which the gates name, or of
            the best one, whose speed-up must then be significant.

    Raises:
        UsageError: a speed gate is set, and what it is on was not timed.
    """
    outcomes = []

    def at_most(gate: str, subject: str, limit: float | None, measured: float) -> None:
        if limit is not None:
            outcomes.append(GateOutcome(gate, subject, limit, measured, measured <= limit))

    def at_least(gate: str, subject: str, limit: float | None, measured: float) -> None:
        if limit is not None:
            outcomes.append(GateOutcome(gate, subject, limit, measured, measured >= limit))

    if evaluation is not None:
        # what a task does not measure passes no gate
        increase = evaluation.get("perplexity", math.nan) / evaluation.get("baseline_perplexity", math.nan) - 1
        metric = next((name for name in evaluation.get("metrics", ()) if name in MORE_IS_BETTER), "")
        retained = evaluation.get(metric, math.nan) / evaluation.get(f"baseline_{metric}", math.nan)
        fidelity = evaluation["fidelity"]
        at_most("max_perplexity_increase", "pruned", gates.max_perplexity_increase, increase)
        at_least("min_retained", "pruned", gates.min_retained, retained)
        at_most("max_mean_kl", "pruned", gates.max_mean_kl, fidelity.get("mean_kl", math.nan))
        at_least("min_top1_agreement", "pruned", gates.min_top1_agreement, fidelity.get("top1_agreement", math.nan))
    for gate, limit, speedup in (
        ("min_decode_speedup", gates.min_decode_speedup, "decode_speedup"),
        ("min_prefill_speedup", gates.min_prefill_speedup, "prefill_speedup"),
    ):
        if limit is None:
            continue
        timed = [m for m in measurements if m[speedup] is not None and gates.artefact in (None, m["model"])]
        if not timed:
            raise UsageError(f"gate {gate} is on {gates.artefact or 'the best artefact'}, which was not timed")
        for batch in sorted({m["batch"] for m in timed}):
            best = max((m for m in timed if m["batch"] == batch), key=lambda m: m[speedup]["low"])
            outcomes.append(_speed(gate, limit, best, best[speedup], named=gates.artefact is not None))
    return outcomes


def _speed(gate: str, limit: float, best: dict[str, Any], speedup: dict[str, Any], named: bool) -> GateOutcome:
    subject, low = f"{best['model']} in {best['runtime']}, batch {best['batch']}", speedup["low"]
    significant = low > 1
    if not significant and not named:
        subject = f"best of all, {subject}: {NO_SPEED_UP}"
    return GateOutcome(gate, subject, limit, speedup["ratio"], low >= limit and (significant or named), low)
