"""Which charts are drawn, of what, and that each is a picture."""

import io
import math
import random
from itertools import combinations
from unittest.mock import MagicMock

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from gblm_compress.runs import charts
from gblm_compress.runs.rows import Row, layer_rows
from tests.runs.reports import in_8_bits, measured, model, models, report, results


def test_the_front_is_what_a_plain_loop_finds() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 9))]
        kept = {a for a in points if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)}
        assert charts.best(points) == sorted(kept)


def test_the_charts_that_there_is_data_for() -> None:
    drawn = charts.of(report())
    assert [chart.name for chart in drawn] == [
        "quality-bytes", "quality-time", "latency-decode", "latency-prefill", "step", "output-error", "recovery",
    ]  # fmt: skip
    for chart in drawn:
        with Image.open(io.BytesIO(chart.picture)) as picture:
            assert picture.width == 1280 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert len(chart.caption) > 40
    assert charts.of(report(rows=[])) == []


def test_what_is_drawn_is_what_was_measured(monkeypatch) -> None:
    def draw_on_a_mock(draw, *_) -> MagicMock:
        draw(axes := MagicMock())
        return axes

    def given(name: str, method: str) -> list[tuple]:
        return [call.args for call in getattr(drawn[name], method).call_args_list]

    monkeypatch.setattr(charts, "drawn", draw_on_a_mock)
    in_8 = report(rows=measured(models()[0], *in_8_bits()))
    drawn = {chart.name: chart.picture for chart in charts.of(in_8)}
    assert given("quality-bytes", "errorbar") == [(1.0, 20.0), (0.18, 24.0)]  # no perplexity of dense-onnx-int8
    assert given("quality-time", "errorbar") == [(20.0, 20.0), (10.0, 24.0)]
    drawn = {chart.name: chart.picture for chart in charts.of(report())}
    assert given("quality-bytes", "errorbar") == [(1.0, 20.0), (1.0, 24.0), (0.6, 24.0)]
    assert given("quality-bytes", "step") == [([0.6, 1.0], [24.0, 20.0])]
    assert given("step", "barh") == [([0, 1, 2], [10.0, 9.75, 5.0]), ([0, 1, 2], [5.0, 4.875, 2.5])]
    curve, kept = given("recovery", "plot")
    assert curve[:2] == ([0, 4000, 8000, 12_000], [0.9, 0.5, 0.4, 0.45]) and kept[:2] == ([8000], [0.4])
    forward = [each | {"timing": each["timing"] and each["timing"] | {"tpot_ms": None}} for each in models()]
    titles = [[chart.title for chart in charts.of(run)] for run in (report(), report(rows=measured(*forward)))]
    assert "Where a decode step's time goes" in titles[0] and "Where a forward pass's time goes" in titles[1]


def test_no_text_of_a_chart_is_cut_or_covers_another(monkeypatch) -> None:
    """Seven exports whose points lie close together, and whose names share no word."""
    save, draw, drawn, found = Figure.savefig, Text.draw, [], []

    def savefig(figure, *arguments, **options) -> None:
        save(figure, *arguments, **options)
        drawn.clear()
        figure.draw_without_rendering()  # in the figure's own resolution again
        renderer = FigureCanvasAgg(figure).get_renderer()
        shown = [text for text in drawn if text.get_text() and text.get_visible()]
        found.append((figure.bbox, [(text.get_text(), Text.get_window_extent(text, renderer)) for text in shown]))

    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer)))
    monkeypatch.setattr(Figure, "savefig", savefig)
    name = "a-name-of-an-export-that-is-rather-long"
    names = ["bitmask-int8", *(f"{name}-{number}" for number in range(6))]
    many = [model(each, 10.0 + n / 2, 600_000 + 9000 * n, 24.0 - n / 4) for n, each in enumerate(names)]
    charts.of(report(name, rows=[*measured(models()[0], *many), *results(name)]))
    assert len(found) == 7
    for paper, texts in found:
        for text, box in texts:
            assert Bbox.union([box, paper]).extents == pytest.approx(paper.extents, abs=1), text
        for (one, its_box), (other, other_box) in combinations(texts, 2):
            assert not its_box.padded(-1).overlaps(other_box.padded(-1)), (one, other)


def test_zeros_that_differ_between_layers_are_a_chart() -> None:
    layers = {f"layers.{block}.up": {"shape": [64, 64], "nonzeros": 1024 * block} for block in (1, 2)}
    assert [chart.name for chart in charts.of(report(rows=list(layer_rows("pruned", layers))))] == ["sparsity"]


def test_a_method_whose_perplexity_is_not_finite_is_no_point() -> None:
    points = [(Row("a", "seconds", 2.0), Row("a", "perplexity", value, baseline=9.0)) for value in (20.0, math.inf)]
    for each, finite in ((points, points[:1]), (points[1:], [])):
        drawn, expected = (charts.scatter(some, "seconds", "perplexity", log=True) for some in (each, finite))
        assert drawn == expected
