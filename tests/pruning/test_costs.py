"""What settings cost, and which would do more."""

import json
from pathlib import Path

import pytest

from gblm_compress.pruning import costs
from gblm_compress.settings import PruneSettings

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fits-2-4-smollm2-135m.json"


def test_the_perplexities_of_masks_are_those_that_were_measured() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    measured = {row["method"]: round(row["perplexity"], 1) for row in rows}
    assert {row["pattern"] for row in rows} == {"2:4"}
    told = {f"{method}+{fit}": value for fit, masks in costs.MASKS.items() for method, value in masks.items()}
    assert told == {name: value for name, value in measured.items() if name != "sparsegpt"}


def test_a_mask_is_recommended_where_it_was_clearly_better(monkeypatch) -> None:
    monkeypatch.setattr(costs, "MASKS", {"fast": {"gblm": 100.0, "wanda": 94.0, "obs": 90.0}})
    assert costs.better_method(PruneSettings(pattern="2:4", fit="fast")) == "obs"
    assert costs.better_method(PruneSettings(pattern="2:4", fit="fast", method="wanda")) is None  # within the noise
    assert costs.better_method(PruneSettings(pattern="2:4", fit="fast", method="obs")) is None
    for others in (
        {"pattern": "4:8"},
        {"fit": "balanced"},
        {"method": "magnitude"},
        {"refine": "swap"},
        {"quantise": "int8"},
    ):
        assert costs.better_method(PruneSettings(**{"pattern": "2:4", "fit": "fast"} | others)) is None


@pytest.mark.parametrize(
    ("settings", "fit"),
    [
        ({"fit": "none"}, "balanced"),
        ({"fit": "fast"}, "balanced"),
        ({"fit": "balanced"}, "best"),
        ({"fit": "best"}, None),
        ({"update": "obs"}, "balanced"),
        ({"update": "none", "distillation_epochs": 1}, None),
    ],
)
def test_the_next_fit_does_more_and_takes_longer(settings, fit) -> None:
    chosen = PruneSettings(**settings)
    assert costs.better_fit(chosen) == fit
    if fit is not None:
        assert costs.passes(PruneSettings(fit=fit)) > costs.passes(chosen)
    assert costs.better_fit(PruneSettings(fit="none"), ["fast"]) == "fast"
