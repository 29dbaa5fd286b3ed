"""Which charts are drawn, of what, and that each is a picture."""

import io
import random

import pytest
from PIL import Image

from gblm_compress.runs import charts
from tests.runs.reports import HOSTILE, measured, models, report


def test_the_front_is_what_a_plain_loop_finds() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 9))]
        kept = []
        for a in points:
            beaten = any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)
            if not beaten and a not in kept:
                kept.append(a)
        assert charts.best(points) == sorted(kept)


@pytest.mark.parametrize("name", ["bitmask", HOSTILE])
def test_the_charts_that_there_is_data_for(name) -> None:
    drawn = charts.of(report(name))
    assert [chart.name for chart in drawn] == [
        "quality-bytes", "quality-time", "latency-decode", "latency-prefill", "byte-limit", "step",
        "methods-perplexity", "methods-mean-kl", "sparsity", "output-error", "recovery",
    ]  # fmt: skip
    for chart in drawn:
        with Image.open(io.BytesIO(chart.picture)) as picture:
            assert picture.width == 1280 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert len(chart.caption) > 40
    assert charts.of(report(rows=[])) == []


def test_what_generates_nothing_is_said_to_run_forward_passes() -> None:
    forward = [each | {"timing": each["timing"] and each["timing"] | {"tpot_ms": None}} for each in models()]
    titles = {chart.name: (chart.title, chart.caption) for chart in charts.of(report(rows=measured(*forward)))}
    assert "decode" not in str(titles["step"]) and titles["step"][0] == "Where a forward pass's time goes"
    assert titles["latency-prefill"][0] == "Time of a forward pass" and "prefill" not in titles["latency-prefill"][1]
    told = {chart.name: (chart.title, chart.caption) for chart in charts.of(report())}
    assert "decode step" in told["step"][0] and "prefill" in told["latency-prefill"][1]


class Axes:
    """Takes what a chart draws on it, in place of matplotlib's axes."""

    def __init__(self) -> None:
        self.drawn: dict[str, list] = {}

    def __getattr__(self, name: str):
        return lambda *given, **_: self.drawn.setdefault(name, []).append(given) or (0.0, 1.0)


def drawn_by(monkeypatch, make) -> dict[str, list]:
    axes = Axes()
    monkeypatch.setattr(charts, "drawn", lambda draw, height: draw(axes) or b"")
    monkeypatch.setattr(charts, "_logarithmic", lambda *_: None)
    assert make(report()) is not None
    return axes.drawn


def test_points_front_and_byte_limit_are_what_was_measured(monkeypatch) -> None:
    found = drawn_by(monkeypatch, charts.quality_and_size)
    assert found["errorbar"] == [(1.0, 20.0), (1.0, 24.0), (0.6, 24.0)]
    assert found["step"] == [([0.6, 1.0], [24.0, 20.0])]
    (limits,) = [given[0] for given in drawn_by(monkeypatch, charts.byte_limit)["plot"] if "|" in given]
    assert limits == [1.0, 1_000_000 / 600_000]


def test_parts_of_a_step_tiles_of_layers_and_the_kept_weights(monkeypatch) -> None:
    assert drawn_by(monkeypatch, charts.step)["barh"] == [
        ([0, 1, 2], [10.0, 9.75, 5.0]),
        ([0, 1, 2], [5.0, 4.875, 2.5]),
    ]
    monkeypatch.undo()
    curve, kept = drawn_by(monkeypatch, charts.recovery)["plot"]
    assert curve[:2] == ([0, 4000, 8000, 12_000], [0.9, 0.5, 0.4, 0.45]) and kept[:2] == ([8000], [0.4])
