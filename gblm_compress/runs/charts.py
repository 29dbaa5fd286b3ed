"""The charts of a report as Vega-Lite specifications: the page draws them, and `images` makes pictures of the same."""

from collections.abc import Callable
from typing import get_args

from gblm_compress.measure.timings import Part
from gblm_compress.printing import printable
from gblm_compress.runs import vega
from gblm_compress.runs.figures import LESS_IS_BETTER, Figure
from gblm_compress.runs.run_report import RunReport
from gblm_compress.runs.summary import ModelSummary
from gblm_compress.runs.vega import COLOURS, ROW, Chart, Spec

PARTS = get_args(Part)
"""What a decode step is made of, see `measure.onnx_runtime.part_of`."""


def of(report: RunReport) -> list[Chart]:
    """The charts that a report has data for."""
    return [chart for make in CHARTS if (chart := make(report)) is not None]


def quality_against_bytes(report: RunReport) -> Chart | None:
    """The metric that counts first over megabytes on disk."""
    points = _points(report, lambda row, found: Figure(found["bytes"].value / 1e6))
    what = "Quality against size: to the left is smaller. The broken line joins what nothing else beats on both."
    return _front(report, "quality-bytes", "Quality and size", what, "megabytes on disk", points)


def quality_against_time(report: RunReport) -> Chart | None:
    """The metric that counts first over milliseconds per token."""
    name = "tpot_ms" if _generates(report) else "ttft_ms"
    batch = report.smallest_batch
    points = _points(report, lambda row, found: found.get(name) if row.batch == batch else None)
    axis = "ms per token" if name == "tpot_ms" else "ms per forward pass"
    what = f"Quality against time at batch {batch}: to the left is faster, and lines span p10 to p90. The broken line "
    return _front(
        report, "quality-time", "Quality and speed", what + "joins what nothing else beats on both.", axis, points
    )


def first_token(report: RunReport) -> Chart | None:
    """Time to first token, or of the forward pass of what generates nothing."""
    if _generates(report):
        return _latency(report, "ttft_ms", "latency-prefill", "prefill", "Time to the first token")
    return _latency(report, "ttft_ms", "latency-prefill", "a forward pass", "Time of a forward pass")


def next_token(report: RunReport) -> Chart | None:
    """Time per output token."""
    return _latency(report, "tpot_ms", "latency-decode", "decode", "Time per token after the first")


def byte_limit(report: RunReport) -> Chart | None:
    """How much faster each artefact decodes, beside what its bytes allow."""
    values: list[Spec] = []
    for row in report.pruned_rows:
        base, speedup = report.baseline(row), report.figures(row).get("decode_speedup")
        if base is not None and speedup is not None:
            limit = base.bytes_on_disk / row.bytes_on_disk
            values.append({"row": vega.label(row), **vega.ends(speedup), "limit": limit, "kind": vega.kind(row)})
    if not values:
        return None
    order = [value["row"] for value in values]
    mark = {
        "mark": {"type": "tick", "thickness": 3, "size": ROW * 0.7, "color": COLOURS[4]},
        "encoding": {"x": {"field": "limit", "type": "quantitative"}, **vega.rows(order)},
    }
    one = {"mark": {"type": "rule", "strokeDash": [4, 4], "color": COLOURS[0]}, "encoding": {"x": {"datum": 1}}}
    layers = [one, *vega.dots("times as fast as dense", values, "limit"), mark]
    return Chart(
        "byte-limit",
        "Decoding, and what the bytes allow",
        "A decode step reads every weight once, so that fewer bytes set a limit: the upright mark is the dense model's "
        "bytes over the artefact's. The dot is what was measured, its line the interval. What lies between them is "
        "attention, norms, threads that wait, and arithmetic on packed weights; beyond the mark, the kernel is better "
        "than dense's.",
        {"data": {"values": values}, "height": ROW * len(order), "layer": layers},
    )


def step(report: RunReport) -> Chart | None:
    """Where the time of a decode step goes, or of the forward pass of what generates nothing."""
    values: list[Spec] = [
        {"row": printable(f"{row.model} · {row.runtime}"), "part": part, "ms": ms, "place": PARTS.index(part)}
        for row in report.rows
        if row.timing and row.batch == report.smallest_batch
        for part, ms in row.timing.step_ms.items()
    ]
    if not values:
        return None
    order = list(dict.fromkeys(value["row"] for value in values))
    colour = {"domain": list(PARTS), "range": [COLOURS[i] for i in (1, 0, 2, 3, 4)]}
    title, of = "Where a forward pass's time goes", "a forward pass of one sample, profiled apart from the timings"
    if _generates(report):
        title = "Where a decode step's time goes"
        of = "a step on one token, profiled apart from the timings and without a prompt"
    return Chart(
        "step",
        title,
        f"Milliseconds of each part of {of}: what zeros shorten is the products, and attention, norms and the rest "
        "stay.",
        {
            "data": {"values": values},
            "height": ROW * len(order),
            "mark": {"type": "bar"},
            "encoding": {
                "x": {"field": "ms", "type": "quantitative", "title": "milliseconds", "axis": {"tickCount": 5}},
                "order": {"field": "place"},
                "color": {
                    "field": "part",
                    "type": "nominal",
                    "title": None,
                    "scale": colour,
                    "legend": {"orient": "top", "columns": 3},
                },
                "tooltip": [
                    {"field": "row", "title": "of"},
                    {"field": "part"},
                    {"field": "ms", "type": "quantitative", "format": ".2f"},
                ],
                **vega.rows(order),
            },
        },
    )


def perplexity_by_method(report: RunReport) -> Chart | None:
    """Perplexity of a grid."""
    return _methods(report, "perplexity", "Perplexity by method")


def divergence_by_method(report: RunReport) -> Chart | None:
    """KL divergence of a grid."""
    return _methods(report, "mean_kl", "KL divergence from dense by method")


def sparsity(report: RunReport) -> Chart | None:
    """Zeros of every pruned layer, block by projection."""
    what = "The fraction of zeros in each pruned layer: a column is a block of the model, a row a projection in it."
    zeros = {layer.name: 1 - layer.nonzeros / layer.weights for layer in report.layers}
    return _by_layer(report, "sparsity", "Zeros by layer", what, "zeros", zeros, top=1.0)


def output_error(report: RunReport) -> Chart | None:
    """How far the output of every pruned layer is from that of its dense weights, block by projection."""
    what = (
        "How far the output of each layer was from what its dense weights give for the same inputs, as a share of "
        "that, on the calibration text when it was pruned and fitted: dark is where pruning costs most."
    )
    errors = {layer.name: layer.output_error for layer in report.layers if layer.output_error is not None}
    return _by_layer(report, "output-error", "Error by layer", what, "error", errors, max(errors.values(), default=1.0))


def recovery(report: RunReport) -> Chart | None:
    """The loss on held-out text, over the tokens that a recovery was trained on."""
    what = (
        "How far the predictions are from the dense model's, mixed with the cross-entropy of the text where the "
        "training weighs it, on text that the training does not see: lower is better. The filled dot is what was kept."
    )
    return _curve(report, "recovery", "Learning curve", what, "held_out", "nats per token", ".3~f")


def mask(report: RunReport) -> Chart | None:
    """The share of the first mask's survivors that is gone, over the tokens that a recovery was trained on."""
    if not any(look.moved for look in report.recovery):
        return None
    what = (
        "The share of the weights that pruning kept and that are zero by now; as many others took their places. The "
        "filled dot is what was kept."
    )
    return _curve(report, "recovery-mask", "How far the mask moved", what, "moved", "survivors that are gone", ".1%")


CHARTS: tuple[Callable[[RunReport], Chart | None], ...] = (
    quality_against_bytes,
    quality_against_time,
    next_token,
    first_token,
    byte_limit,
    step,
    perplexity_by_method,
    divergence_by_method,
    sparsity,
    output_error,
    recovery,
    mask,
)
"""Every chart, in the order of the page."""


def _by_layer(
    report: RunReport, name: str, title: str, what: str, field: str, shares: dict[str, float], top: float
) -> Chart | None:
    """A share of each layer as the darkness of a tile, a column for each block and a row for each projection."""
    values = [
        {
            "block": layer.block,
            "projection": printable(layer.projection),
            field: shares[layer.name],
            "layer": printable(layer.name),
        }
        for layer in report.layers
        if layer.block is not None and layer.name in shares
    ]
    if not values:
        return None
    projections = list(dict.fromkeys(value["projection"] for value in values))
    return Chart(
        name,
        title,
        what,
        {
            "data": {"values": values},
            "height": ROW * len(projections),
            "mark": {"type": "rect"},
            "encoding": {
                "x": {"field": "block", "type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": True}},
                "y": {"field": "projection", "type": "nominal", "sort": projections, "title": None},
                "color": {
                    "field": field,
                    "type": "quantitative",
                    "scale": {"scheme": "blues", "domain": [0, top]},
                    "legend": {"format": ".0%", "orient": "top"},
                },
                "tooltip": [
                    {"field": "layer"},
                    {"field": field, "type": "quantitative", "format": ".2%"},
                ],
            },
        },
    )


def _points(report: RunReport, x_of: Callable[[ModelSummary, dict[str, Figure]], Figure | None]) -> list[Spec]:
    """One point for each row that has both coordinates; an artefact that was evaluated in one runtime keeps its
    quality in others, and so does the dense model."""
    dense = report.rows[0].metrics if report.rows else {}
    metric = next(iter(dense), None)
    points = []
    for row in report.rows:
        quality = (dense if row.dense else row.metrics).get(metric or "")
        x = x_of(row, report.figures(row))
        if quality is None or quality.value is None or x is None:
            continue
        error = quality.error or 0.0
        y = {"y": quality.value, "y_low": quality.value - error, "y_high": quality.value + error}
        points.append(
            {"row": vega.label(row), "model": printable(row.model), "kind": vega.kind(row), **vega.ends(x), **y}
        )
    return list({(point["model"], point["kind"], point["middle"]): point for point in points}.values())


def _generates(report: RunReport) -> bool:
    """Whether tokens were generated one by one."""
    return any(row.timing and row.timing.tpot_ms for row in report.rows)


def _front(report: RunReport, name: str, title: str, caption: str, axis: str, points: list[Spec]) -> Chart | None:
    if len(points) < 2:
        return None
    metric = next(iter(report.rows[0].metrics))
    lower_is_better = metric in LESS_IS_BETTER
    sign = 1 if lower_is_better else -1
    line = [{"x": x, "y": sign * y} for x, y in vega.front((point["middle"], sign * point["y"]) for point in points)]
    least, most = min(point["middle"] for point in points), max(point["middle"] for point in points)
    # names of points at the right stand before them, lest they end beyond the chart
    points = [point | {"before": point["middle"] > least + 0.6 * (most - least)} for point in points]
    x = {"field": "middle", "type": "quantitative", "title": axis, "scale": {"padding": 24}, "axis": {"tickCount": 8}}
    y = {"field": "y", "type": "quantitative", "title": metric, "scale": {"zero": False, "padding": 24}}
    shown = {"x": x, "y": y, "color": vega.colour(points), "tooltip": vega.tooltip("row", "middle", "y")}
    return Chart(
        name,
        title,
        caption + (f" Lower {metric} is better." if lower_is_better else f" Higher {metric} is better."),
        {
            "data": {"values": points},
            "height": 280,
            "layer": [
                {
                    "data": {"values": line},
                    "mark": {"type": "line", "interpolate": "step-after", "color": COLOURS[0], "strokeDash": [4, 3]},
                    "encoding": {"x": x | {"field": "x"}, "y": y},
                },
                {"mark": "rule", "encoding": shown | {"y": y | {"field": "y_low"}, "y2": {"field": "y_high"}}},
                {"mark": "rule", "encoding": shown | {"x": x | {"field": "low"}, "x2": {"field": "high"}}},
                {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1}, "encoding": shown},
                {
                    "mark": {
                        "type": "text",
                        "align": {"expr": "datum.before ? 'right' : 'left'"},
                        "dx": {"expr": "datum.before ? -8 : 8"},
                        "dy": -8,
                        "limit": 160,
                    },
                    "encoding": {"x": x, "y": y, "text": {"field": "model"}},
                },
            ],
        },
    )


def _latency(report: RunReport, name: str, chart: str, pass_: str, title: str) -> Chart | None:
    values = [
        {"row": vega.label(row), **vega.ends(found[name]), "kind": vega.kind(row)}
        for row in report.rows
        for found in [report.figures(row)]
        if name in found
    ]
    if not values:
        return None
    caption = f"Milliseconds of {pass_}: a dot is the median over the rounds, a line spans p10 to p90. Grey is dense."
    height = ROW * len({value["row"] for value in values})
    spec = {"data": {"values": values}, "height": height, "layer": vega.dots("milliseconds", values)}
    return Chart(chart, title, caption, spec)


def _curve(report: RunReport, name: str, title: str, caption: str, field: str, axis: str, digits: str) -> Chart | None:
    """One figure of a recovery's looks over its tokens."""
    if not report.recovery:
        return None
    values = [{"tokens": look.tokens, "y": getattr(look, field), "kept": look.kept} for look in report.recovery]
    x = {"field": "tokens", "type": "quantitative", "title": "tokens trained on", "axis": {"format": "~s"}}
    y = {"field": "y", "type": "quantitative", "title": axis, "axis": {"format": digits}}
    shown = [
        {"field": "tokens", "type": "quantitative", "format": ","},
        {"field": "y", "type": "quantitative", "title": axis, "format": digits},
    ]
    dot = {"type": "point", "size": 70, "opacity": 1, "color": COLOURS[1]}
    return Chart(
        name,
        title,
        caption,
        {
            "data": {"values": values},
            "height": 240,
            "encoding": {"x": x, "y": y, "tooltip": shown},
            "layer": [
                {"mark": {"type": "line", "color": COLOURS[1]}},
                {"mark": dot},
                {"mark": dot | {"filled": True}, "transform": [{"filter": "datum.kept"}]},
            ],
        },
    )


def _methods(report: RunReport, field: str, title: str) -> Chart | None:
    values: list[Spec] = []
    for method in report.comparison.rows if report.comparison else ():
        value, error = getattr(method, field), getattr(method, f"{field}_error") or 0.0
        label = printable(f"{method.method}, {method.pattern}")
        ends = vega.ends(Figure(value, value - error, value + error))
        values.append({"row": label, "kind": printable(method.pattern), **ends})
    if not values:
        return None
    axis = "perplexity" if field == "perplexity" else "nats per token"
    return Chart(
        f"methods-{field}".replace("_", "-"),
        title,
        "Further left is better. A line is one standard error over the seeds to each side.",
        {"data": {"values": values}, "height": ROW * len(values), "layer": vega.dots(axis, values)},
    )
