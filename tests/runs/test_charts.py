"""What the charts are made of."""

import random
from dataclasses import replace

import pytest

from gblm_compress.runs import charts, vega
from tests.runs.reports import HOSTILE, report


def test_the_front_is_what_a_plain_loop_finds() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 9))]
        kept = []
        for a in points:
            beaten = any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)
            if not beaten and a not in kept:
                kept.append(a)
        assert vega.front(points) == sorted(kept)


def test_the_charts_that_there_is_data_for() -> None:
    everything = [chart.name for chart in charts.of(report())]
    assert everything == [
        "quality-bytes", "quality-time", "latency-decode", "latency-prefill", "byte-limit", "step",
        "methods-perplexity", "methods-mean-kl", "sparsity", "output-error", "recovery", "recovery-mask",
    ]  # fmt: skip
    assert charts.of(report(rows=[], comparison=None, layers=[], recovery=[])) == []


def test_what_generates_nothing_is_said_to_run_forward_passes() -> None:
    rows = [replace(row, timing=row.timing and replace(row.timing, tpot_ms=None)) for row in report().rows]
    titles = {chart.name: (chart.title, chart.caption) for chart in charts.of(report(rows=rows))}
    assert "decode" not in str(titles["step"]) and titles["step"][0] == "Where a forward pass's time goes"
    assert titles["latency-prefill"][0] == "Time of a forward pass" and "prefill" not in titles["latency-prefill"][1]
    told = {chart.name: (chart.title, chart.caption) for chart in charts.of(report())}
    assert "decode step" in told["step"][0] and "prefill" in told["latency-prefill"][1]


def test_a_learning_curve_has_every_look_and_marks_the_one_that_was_kept() -> None:
    by_name = {chart.name: chart.spec for chart in charts.of(report())}
    curve, mask = (by_name[name]["data"]["values"] for name in ("recovery", "recovery-mask"))
    assert [(value["tokens"], value["y"]) for value in curve] == [(0, 0.9), (4000, 0.5), (8000, 0.4), (12_000, 0.45)]
    assert [value["tokens"] for value in curve if value["kept"]] == [8000]
    assert [value["y"] for value in mask] == [0.0, 0.02, 0.05, 0.06]


def test_a_mask_that_stayed_has_no_chart() -> None:
    still = [replace(look, moved=0.0) for look in report().recovery]
    assert [chart.name for chart in charts.of(report(recovery=still))][-2:] == ["output-error", "recovery"]


def test_points_and_byte_limit_are_what_was_measured() -> None:
    by_name = {chart.name: chart.spec for chart in charts.of(report())}
    points = {point["model"]: point for point in by_name["quality-bytes"]["data"]["values"]}
    assert {name: (point["middle"], point["y"]) for name, point in points.items()} == {
        "dense": (1.0, 20.0), "pruned": (1.0, 24.0), "bitmask": (0.6, 24.0)
    }  # fmt: skip
    assert (points["bitmask"]["y_low"], points["bitmask"]["y_high"]) == (23.5, 24.5)
    (line,) = [layer["data"]["values"] for layer in by_name["quality-bytes"]["layer"] if "data" in layer]
    assert line == [{"x": 0.6, "y": 24.0}, {"x": 1.0, "y": 20.0}]
    parts = {(value["row"], value["part"]): value["ms"] for value in by_name["step"]["data"]["values"]}
    assert parts["bitmask · torch", "packed products"] == 5.0 and parts["bitmask · torch", "rest"] == 2.5
    limits = {value["row"]: value["limit"] for value in by_name["byte-limit"]["data"]["values"]}
    assert limits == {"pruned · torch ×1": 1.0, "bitmask · torch ×1": 1_000_000 / 600_000}


def test_errors_are_of_the_layers_that_have_one_and_as_dark_as_they_are_large() -> None:
    layers = [replace(layer, output_error=None) if layer.block == 1 else layer for layer in report().layers]
    (chart,) = (chart for chart in charts.of(report(layers=layers)) if chart.name == "output-error")
    found = {value["block"]: value["error"] for value in chart.spec["data"]["values"]}
    assert found == {0: 0.1, 2: pytest.approx(0.3)}
    assert chart.spec["encoding"]["color"]["scale"]["domain"] == [0, pytest.approx(0.3)]
    without = [replace(layer, output_error=None) for layer in layers]
    assert "output-error" not in [chart.name for chart in charts.of(report(layers=without))]


def test_names_are_data_and_no_part_of_a_specification() -> None:
    for chart in charts.of(report(HOSTILE)):
        values = str(chart.spec.pop("data"))
        assert "alert" in values or chart.name in ("quality-time", "recovery", "recovery-mask")
        assert "\x1b" not in values
