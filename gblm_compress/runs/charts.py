"""The charts of a report as PNG, drawn by matplotlib."""

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any, get_args

from gblm_compress.measure.timings import Part
from gblm_compress.printing import plain_figures, printable
from gblm_compress.runs.rows import LESS_IS_BETTER, Row, amount
from gblm_compress.runs.run_report import RunReport

GREY = "#7f7f7f"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
"""Colours that people with each kind of colour blindness tell apart (Okabe and Ito). Grey is for dense."""
MARKERS = "os^Dv"
INCHES, DPI = 5.12, 250  # 1280 pixels wide; its text can be read at a third of that
LINE, GAP = 0.17, 0.15  # inches of a line of a label, and between two labels
LETTERS = 18  # of a line of a label
ALIKE = 0.01  # Shares that differ by less would have the same colour.
ZEROS = "The fraction of zeros in each pruned layer: a column is a block of the model, a row a projection in it."
ERRORS = (
    "The error of each layer's output, relative to the output of its dense weights for the same inputs, on the "
    "calibration text when it was pruned and fitted. Pruning costs most in dark layers."
)
TIMES = "a dot is the median over the rounds, a line spans p10 to p90. Grey is dense."
LOSS = "The divergence from dense on text that the training does not see. Lower is better; the filled dot was kept."


@dataclass(frozen=True)
class Chart:
    """A PNG on white with its caption; its file is `name`.png."""

    name: str
    title: str
    caption: str
    picture: bytes


def of(report: RunReport) -> list[Chart]:
    """The charts that a report has data for, unless all values are alike."""
    sizes = [replace(row, value=(row.value or 0) / 1e6) for row in report.find("bytes")]
    figure, axis = ("tpot_ms", "ms per token") if report.generates else ("ttft_ms", "ms per forward pass")
    first, prefill = "Time of a forward pass", "a forward pass"
    if report.generates:
        first, prefill = "Time to the first token", "prefill"
    times = [row for row in report.find(figure) if row.batch == report.smallest_batch]
    smaller = "Quality against size: to the left is smaller."
    faster = f"Quality against time at batch {report.smallest_batch}: to the left is faster; lines span p10 to p90."
    made = (
        _front(report, "quality-bytes", "Quality and size", smaller, sizes, "megabytes on disk"),
        _front(report, "quality-time", "Quality and speed", faster, times, axis),
        _dots("latency-decode", "Time per token after the first", report.find("tpot_ms"), "decode"),
        _dots("latency-prefill", first, report.find("ttft_ms"), prefill),
        _step(report),
        _tiles("sparsity", "Zeros by layer", report.find("zeros"), ZEROS),
        _tiles("output-error", "Error by layer", report.find("output_error"), ERRORS),
        _recovery(report),
    )
    return [chart for chart in made if chart is not None]


def _front(report: RunReport, name: str, title: str, what: str, rows: list[Row], axis: str) -> Chart | None:
    if not report.metrics:
        return None
    metric = report.metrics[0]
    found, less = {row.artefact: row for row in report.find(metric)}, metric in LESS_IS_BETTER
    points = [(row, found[row.artefact]) for row in rows if row.artefact in found]
    if len(points) < 2:
        return None
    caption = f"{what} The broken line joins the points that no other beats on both axes. "
    picture = scatter(points, axis, metric, front=1 if less else -1)
    return Chart(name, title, f"{caption}{'Lower' if less else 'Higher'} {metric} is better.", picture)


def _dots(name: str, title: str, rows: Sequence[Row], what: str) -> Chart | None:
    """A dot with its interval for each time; its name has the columns that differ."""
    if len(rows) < 2:
        return None
    several = [field for field in ("runtime", "batch") if len({getattr(row, field) for row in rows}) > 1]
    labels = [", ".join([_name(row), *(f"{field} {getattr(row, field)}" for field in several)]) for row in rows]

    def draw(axes: Any) -> None:
        for number, row in enumerate(rows):
            axes.errorbar(row.value, number, xerr=_spread(row), fmt="o", color=GREY if row.dense else COLOURS[0])

    return Chart(name, title, f"Milliseconds of {what}: {TIMES}", _lines(draw, labels, "milliseconds"))


def _step(report: RunReport) -> Chart | None:
    rows = [row for row in report.find("step_ms") if row.batch == report.smallest_batch]
    if not rows:
        return None
    labels = list(dict.fromkeys(row.artefact for row in rows))

    def draw(axes: Any) -> None:
        ends = dict.fromkeys(labels, 0.0)
        for part, colour in zip(get_args(Part), (COLOURS[0], GREY, *COLOURS[1:]), strict=False):
            if widths := {row.artefact: row.value or 0.0 for row in rows if row.part == part}:
                lines, left = [labels.index(label) for label in widths], [ends[label] for label in widths]
                axes.barh(lines, list(widths.values()), left=left, color=colour, label=part)
                ends |= {label: ends[label] + width for label, width in widths.items()}

    title, of_what = "Where a forward pass's time goes", "a forward pass of one sample, profiled apart from the timings"
    if report.generates:
        title = "Where a decode step's time goes"
        of_what = "a step on one token, profiled apart from the timings and without a prompt"
    what = f"Milliseconds of each part of {of_what}. Zeros shorten the products; attention, norms and the rest stay."
    return Chart("step", title, what, _lines(draw, labels, "milliseconds"))


def _recovery(report: RunReport) -> Chart | None:
    rows = report.find("held_out_loss")

    def draw(axes: Any) -> None:
        for shown, face in ((rows, "white"), ([row for row in rows if row.part == "kept"], COLOURS[0])):
            axes.plot([row.tokens for row in shown], [row.value for row in shown], "o-", color=COLOURS[0], mfc=face)
        axes.set(xlabel="tokens trained on", ylabel="validation loss")

    return Chart("recovery", "Learning curve", LOSS, drawn(draw, 2.4)) if len(rows) > 1 else None


@plain_figures()
def drawn(draw: Callable[[Any], None], height: float) -> bytes:
    """A picture, `height` inches high besides its labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, 0.7 + height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    if legend := axes.get_legend_handles_labels()[1]:
        columns = max(1, 56 // (6 + max(map(len, legend))))
        figure.set_figheight(0.8 + height + 0.2 * math.ceil(len(legend) / columns))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, columnspacing=1)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    return picture.getvalue()


def scatter(points: Sequence[tuple[Row, Row]], x: str, y: str, *, front: int = 0, log: bool = False) -> bytes:
    """Points (row of x, row of y) with their errors and names, without those that are not finite.

    `front` joins the points that no other beats, where smaller x and smaller (1) or larger (-1) y are better; `log`
    draws logarithmic axes, and the dense model as a broken line.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    points = [(a, b) for a, b in points if a.value is not None and b.value is not None]

    def draw(axes: Any) -> None:
        if log and points:
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
            axes.axhline(points[0][1].baseline, color=GREY, ls="--", lw=1)
        axes.margins(0.15)
        styles, greys = product(MARKERS, COLOURS), cycle(MARKERS)
        for a, b in points:
            marker, colour = (next(greys), GREY) if a.dense else next(styles)
            style = {"fmt": marker, "color": colour, "label": _name(a)}
            axes.errorbar(a.value, b.value, yerr=b.error, xerr=_spread(a), **style)
        if front:
            line = best((a.value or 0, front * (b.value or 0)) for a, b in points)
            axes.step([a for a, _ in line], [front * b for _, b in line], where="post", color=GREY, ls="--", lw=1)
        axes.set(xlabel=x, ylabel=y)

    return drawn(draw, 2.8)


def best(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats, where smaller is better in both coordinates."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _tiles(name: str, title: str, rows: Sequence[Row], caption: str) -> Chart | None:
    """A tile for each layer, darker for a larger share; columns are blocks, lines projections."""
    places: dict[tuple[str, int], float] = {}
    for row in rows:
        parts = row.part.split(".")
        if numbers := [i for i, part in enumerate(parts) if part.isdecimal()]:
            places[".".join(parts[numbers[0] + 1 :]), int(parts[numbers[0]])] = row.value or 0.0
    if not places or max(places.values()) - min(places.values()) < ALIKE:
        return None
    projections, blocks = (list(dict.fromkeys(each)) for each in zip(*places, strict=True))
    shown = [[places.get((projection, block), math.nan) for block in blocks] for projection in projections]

    def draw(axes: Any) -> None:
        image = axes.imshow(shown, cmap="Blues", aspect="auto", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, format=lambda share, _: amount("zeros", share))
        axes.set_xticks(range(len(blocks)), blocks)

    return Chart(name, title, caption, _lines(draw, projections, "block", ticks=11))


def _spread(row: Row) -> list[list[float]] | None:
    if row.value is not None and row.low is not None and row.high is not None:
        return [[max(row.value - row.low, 0.0)], [max(row.high - row.value, 0.0)]]
    return None if row.error is None else [[row.error], [row.error]]


def _name(row: Row) -> str:
    return printable(f"{row.artefact}, {row.part}" if row.part else row.artefact)[:60]


def _lines(draw: Callable[[Any], None], labels: Sequence[str], axis: str, ticks: int = 7) -> bytes:
    """A picture with a line for each label, and at most so many ticks on the axis below."""
    wrapped = ["\n".join(textwrap.wrap(printable(label)[:60], LETTERS)) for label in labels]

    def draw_lines(axes: Any) -> None:
        draw(axes)
        axes.set_yticks(range(len(labels)), wrapped)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=ticks)
        axes.set_xlabel(axis)

    return drawn(draw_lines, len(labels) * (GAP + LINE * max(1 + label.count("\n") for label in wrapped)))
