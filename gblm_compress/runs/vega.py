"""What charts share: colours, axes, dots with intervals, as pieces of Vega-Lite."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gblm_compress.printing import printable
from gblm_compress.runs.figures import Figure
from gblm_compress.runs.summary import ModelSummary

Spec = dict[str, Any]
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
"""Grey for dense, then colours that people with each kind of colour blindness tell apart (Okabe and Ito), all of them
readable on white and on near-black."""
DENSE = "dense"
ROW = 26  # pixels of a row of labels


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: of its place on the page and of its picture.
        caption: what it shows and how to read it; it is the text for those who do not see it.
        spec: Vega-Lite, without width and colours of text.
    """

    name: str
    title: str
    caption: str
    spec: Spec


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, both of which are better when smaller; by the first one."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def dots(axis: str, values: list[Spec], *more: str) -> list[Spec]:
    """Dots with intervals, a row for each label; `more` fields are in the tooltip."""
    order = list(dict.fromkeys(value["row"] for value in values))
    x = {"type": "quantitative", "title": axis, "scale": {"zero": False, "nice": True}}
    shown = tooltip("row", "middle", "low", "high", *more)
    shared = rows(order) | {"color": colour(values), "tooltip": shown}
    return [
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": shared | {"x": x | {"field": "low"}, "x2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": shared | {"x": x | {"field": "middle"}},
        },
    ]


def rows(order: list[str]) -> Spec:
    """The axis of labels, in that order."""
    return {"y": {"field": "row", "type": "nominal", "sort": order, "title": None}}


def colour(values: list[Spec]) -> Spec:
    """By kind; dense is grey."""
    kinds = sorted({value["kind"] for value in values}, key=lambda kind: (kind != DENSE, kind))
    colours = COLOURS if DENSE in kinds else COLOURS[1:]
    shown = [colours[i % len(colours)] for i in range(len(kinds))]
    scale = {"domain": kinds, "range": shown}
    return {"field": "kind", "type": "nominal", "title": None, "scale": scale, "legend": {"orient": "top"}}


def tooltip(*names: str) -> list[Spec]:
    """What shows under the pointer: fields of a value by their names."""
    numbers = {"middle": "median", "low": "p10", "high": "p90", "limit": "byte limit", "y": "quality"}
    return [
        {"field": name, "type": "quantitative", "title": numbers[name], "format": ".3~f"}
        if name in numbers
        else {"field": name, "title": "of"}
        for name in names
    ]


def ends(figure: Figure) -> dict[str, float]:
    """A figure as fields of a value; one without an interval has no width."""
    low = figure.value if figure.low is None else figure.low
    return {"middle": figure.value, "low": low, "high": figure.value if figure.high is None else figure.high}


def label(row: ModelSummary) -> str:
    """A row in words, short enough for the side of a chart."""
    batch = "" if row.batch is None else f" ×{row.batch}"
    return printable(f"{row.model} · {row.runtime}{batch}")


def kind(row: ModelSummary) -> str:
    """What decides a row's colour."""
    return DENSE if row.dense else row.runtime
