"""Gates: conditions of a recipe on what was measured, for continuous integration to pass or fail on."""

from dataclasses import dataclass
from typing import Any

from gblm_compress.settings import GateSettings


@dataclass(frozen=True)
class GateOutcome:
    """One condition: what it is on, its limit, what was measured, and whether it holds."""

    gate: str
    subject: str
    limit: float
    measured: float
    passed: bool


def check_gates(
    gates: GateSettings, evaluation: dict[str, Any] | None, measurements: list[dict[str, Any]]
) -> list[GateOutcome]:
    """Hold every set gate against the results.

    Args:
        evaluation: of the pruned model (`EvaluateResult.as_dict`), with its baseline.
        measurements: of the benchmark (`Measurement` as plain values); a speed gate applies, for each
            batch size, to the fastest of those that have a baseline: one artefact that delivers is enough.
    """
    outcomes = []

    def at_most(gate: str, subject: str, limit: float | None, measured: float) -> None:
        if limit is not None:
            outcomes.append(GateOutcome(gate, subject, limit, measured, measured <= limit))

    def at_least(gate: str, subject: str, limit: float | None, measured: float) -> None:
        if limit is not None:
            outcomes.append(GateOutcome(gate, subject, limit, measured, measured >= limit))

    if evaluation is not None:
        increase = evaluation["perplexity"] / evaluation["baseline_perplexity"] - 1
        fidelity = evaluation["fidelity"]
        at_most("max_perplexity_increase", "pruned", gates.max_perplexity_increase, increase)
        at_most("max_mean_kl", "pruned", gates.max_mean_kl, fidelity["mean_kl"])
        at_least("min_top1_agreement", "pruned", gates.min_top1_agreement, fidelity["top1_agreement"])
    compared = [m for m in measurements if m["decode_speedup"] is not None]
    for batch in sorted({m["batch"] for m in compared}):
        for gate, limit, speedup in (
            ("min_decode_speedup", gates.min_decode_speedup, "decode_speedup"),
            ("min_prefill_speedup", gates.min_prefill_speedup, "prefill_speedup"),
        ):
            best = max((m for m in compared if m["batch"] == batch), key=lambda m: m[speedup]["ratio"])
            at_least(gate, f"{best['model']} in {best['runtime']}, batch {batch}", limit, best[speedup]["ratio"])
    return outcomes
