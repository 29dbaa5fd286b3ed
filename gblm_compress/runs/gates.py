"""Gates: conditions of a recipe on what was measured, for continuous integration to pass or fail on."""

from collections.abc import Sequence
from dataclasses import dataclass

from gblm_compress.measure.timings import NO_SPEED_UP
from gblm_compress.runs.figures import Figure, figures
from gblm_compress.runs.summary import ModelSummary
from gblm_compress.settings import GATES, GateSettings


@dataclass(frozen=True)
class GateOutcome:
    """One condition: what it is on, its limit, what was measured, and whether it holds.

    Attributes:
        measured: None where it was not measured, which passes no gate.
        bound: the end of its interval that is held against the limit; None where there is no interval.
        artefact: the folder that it is on; None where nothing was measured of any.
    """

    gate: str
    subject: str
    limit: float
    measured: float | None
    passed: bool
    bound: float | None = None
    artefact: str | None = None


def check_gates(groups: Sequence[GateSettings], rows: list[ModelSummary]) -> list[GateOutcome]:
    """Hold every set gate against the rows of a report, of which the first is the dense model.

    A gate on quality is on every artefact that was evaluated, or on the one that its group names. Any other is on the
    best one at each batch size; a speed-up must then be significant, unless its artefact is named.
    """
    if not rows:
        return []
    measured = [(row, figures(row, rows[0].bytes_on_disk)) for row in rows if not row.dense]
    outcomes = []
    for group in groups:
        of_group = [(row, found) for row, found in measured if group.artefact in (None, row.model)]
        for name, limit in group.limits.items():
            readings = [(row, found[name[4:]]) for row, found in of_group if name[4:] in found]
            if not readings:
                subject = f"{group.artefact or 'all artefacts'}: not measured"
                outcomes.append(GateOutcome(name, subject, limit, None, False, artefact=group.artefact))
            elif GATES[name].needs in ("evaluate", "tasks"):
                each = {row.model: reading for row, reading in readings}
                outcomes += [_outcome(name, limit, model, model, reading) for model, reading in each.items()]
            else:
                outcomes += _of_best(name, limit, readings, named=group.artefact is not None)
    return outcomes


def _of_best(name: str, limit: float, readings: list[tuple[ModelSummary, Figure]], named: bool) -> list[GateOutcome]:
    timed = GATES[name].needs == "benchmark"
    outcomes = []
    for batch in sorted({row.batch or 0 for row, _ in readings}) if timed else [None]:
        here = [(row, reading) for row, reading in readings if not timed or (row.batch or 0) == batch]
        row, best = (max if name.startswith("min_") else min)(here, key=lambda pair: _worse_end(name, pair[1]))
        subject = f"{row.model} in {row.where}" if timed else row.model
        outcome = _outcome(name, limit, row.model, subject, best)
        if name.endswith("speedup") and not named and (best.low or 0) <= 1:
            subject = f"best of all, {subject}: {NO_SPEED_UP}"
            outcome = GateOutcome(name, subject, limit, best.value, False, best.low, row.model)
        outcomes.append(outcome)
    return outcomes


def _outcome(name: str, limit: float, artefact: str, subject: str, figure: Figure) -> GateOutcome:
    end = _worse_end(name, figure)
    passed = end >= limit if name.startswith("min_") else end <= limit
    return GateOutcome(name, subject, limit, figure.value, passed, end if figure.low is not None else None, artefact)


def _worse_end(name: str, figure: Figure) -> float:
    """The end of a figure's interval that is held against the limit; its value where there is none."""
    end = figure.low if name.startswith("min_") else figure.high
    return figure.value if end is None else end
