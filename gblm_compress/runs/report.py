"""The report of a run: one table of dense against pruned, for the terminal, `report.json` and a web page."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gblm_compress.models.source import ModelSource
from gblm_compress.printing import plain_figures, printable, printable_lines
from gblm_compress.storage import records

REPORT, PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class ModelSummary:
    """One model in one runtime at one batch size; a field is None where it was not measured.

    Attributes:
        metric: the one of its task that counts first, perplexity say.
        value, error: of that metric.
        nonzero_fraction: of the weights in the pruned layers.
        ttft_ms, tpot_ms: medians in milliseconds; TTFT is the forward pass where nothing is generated.
        prefill_verdict, decode_verdict: the speed-up against dense in words.
    """

    model: str
    runtime: str
    dtype: str | None
    batch: int | None
    metric: str | None
    value: float | None
    error: float | None
    nonzero_fraction: float
    bytes_on_disk: int
    ttft_ms: float | None
    tpot_ms: float | None
    prefill_verdict: str | None
    decode_verdict: str | None
    peak_memory_bytes: int | None


def summarise(
    dense: ModelSource,
    pruned: ModelSource,
    exports: list[ModelSource],
    baselines: list[ModelSource],
    prune_result: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
    measurements: list[dict[str, Any]],
) -> list[ModelSummary]:
    """A summary of every model and export at each batch size; dense first within a runtime."""
    density = prune_result["nonzeros"] / prune_result["weights"]
    metric = next((name for evaluation in evaluations.values() for name in evaluation["metrics"]), None)
    result = []
    ordered = [dense, pruned] + [b for b in baselines if b.is_onnx] + exports
    for source in sorted(ordered, key=lambda s: (_runtime(s) != "torch", _runtime(s))):
        is_dense = source in baselines
        label = "dense" if source is dense else source.name
        evaluation = evaluations.get(source.name)
        value = evaluation[metric] if evaluation and metric else None
        error = evaluation[f"{metric}_error"] if evaluation and metric else None
        if source is dense and metric:
            value = next(iter(evaluations.values()))[f"baseline_{metric}"]
        timed: list[Any] = [m for m in measurements if m["model"] == source.name] or [None]
        for m in timed:
            result.append(
                ModelSummary(
                    model=label,
                    runtime=_runtime(source),
                    dtype=m and m["dtype"],
                    batch=m and m["batch"],
                    metric=metric,
                    value=value,
                    error=error,
                    nonzero_fraction=1.0 if is_dense else density,
                    bytes_on_disk=source.bytes_on_disk,
                    ttft_ms=m and m["ttft_ms"]["median"],
                    tpot_ms=m and m["tpot_ms"] and m["tpot_ms"]["median"],
                    prefill_verdict=m and m["prefill_speedup"] and m["prefill_speedup"]["verdict"],
                    decode_verdict=m and m["decode_speedup"] and m["decode_speedup"]["verdict"],
                    peak_memory_bytes=m and m["peak_memory_bytes"],
                )
            )
    return result


def _runtime(source: ModelSource) -> str:
    if source.needs_cuda:
        return "torch (CUDA)"
    return "onnxruntime" if source.is_onnx else "torch"


def columns(models: list[ModelSummary]) -> list[str]:
    """The heads of the table's columns."""
    metric = next((model.metric for model in models if model.metric), "perplexity")
    times = ["TTFT ms", "TPOT ms", "decode against dense"] if generate(models) else ["forward ms", "against dense"]
    return ["model", "runtime", "batch", metric, "nonzero", "on disk", *times]


def generate(models: list[ModelSummary]) -> bool:
    """Whether they generate, as far as was measured."""
    return not any(model.ttft_ms is not None and model.tpot_ms is None for model in models)


def texts(model: ModelSummary, generates: bool) -> list[str]:
    """A summary as text, one for each of `columns`."""
    digits = 2 if model.metric == "perplexity" else 4
    value = "" if model.value is None else f"{model.value:.{digits}f}"
    if model.error is not None:
        value += f" ±{model.error:.{digits}f}"
    tpot = "" if model.tpot_ms is None else f"{model.tpot_ms:.1f}"
    return [
        model.model,
        model.runtime + (f" {model.dtype}" if model.dtype else ""),
        "" if model.batch is None else str(model.batch),
        value,
        f"{100 * model.nonzero_fraction:.1f} %",
        decimal(model.bytes_on_disk),
        "" if model.ttft_ms is None else f"{model.ttft_ms:.1f}",
        *([tpot] if generates else []),
        _verdict(model, generates) or ("not timed" if _time(model, generates) is None else ""),
    ]


def _time(model: ModelSummary, generates: bool) -> float | None:
    return model.tpot_ms if generates else model.ttft_ms


def _verdict(model: ModelSummary, generates: bool) -> str | None:
    return model.decode_verdict if generates else model.prefill_verdict


def table(models: list[ModelSummary]) -> Table:
    """The summaries for a terminal."""
    heads, generates = columns(models), generate(models)
    result = Table(*heads[:2])
    for column in heads[2:-1]:
        result.add_column(column, justify="right")
    result.add_column(heads[-1])
    for model in models:
        result.add_row(*texts(model, generates))
    return result


def gate_table(gates: list[Any]) -> Table:
    """The gates for a terminal."""
    result = Table("gate", "of", "limit", "measured", "lower end", "holds")
    for gate in gates:
        holds = Text("yes") if gate.passed else Text("no", style="bold red")
        low = "" if gate.low is None else f"{gate.low:.3f}"
        result.add_row(gate.gate, gate.subject, f"{gate.limit:g}", f"{gate.measured:.3f}", low, holds)
    return result


def write(content: dict[str, Any], output: Path) -> None:
    """Write `report.json` and the page made of it."""
    records.write_text(output / REPORT, records.as_json(content))
    models = [ModelSummary(**values) for values in content["rows"]]
    page = Environment(autoescape=True, finalize=_shown).from_string(_PAGE)
    html = page.render(
        columns=columns(models),
        rows=[texts(model, generate(models)) for model in models],
        gates=content["gates"],
        stages=content["stages"],
        environment=content["environment"],
        recipe=json.dumps(content["recipe"], indent=2),
        plot=_plot(models),
    )
    records.write_text(output / PAGE, html)


def _shown(value: Any) -> Any:
    """Text that every file can hold: names may have bytes that are no UTF-8."""
    return printable_lines(value) if isinstance(value, str) else value


@plain_figures()
def _plot(models: list[ModelSummary]) -> str | None:
    """Latency of decode, or of the forward pass, as bars, one for each timed summary, as base64 PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    generates = generate(models)
    timed = [model for model in models if _time(model, generates) is not None]
    if not timed:
        return None
    figure = Figure(figsize=(8, 0.5 * len(timed) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    labels = [f"{printable(model.model)}, {model.runtime}, batch {model.batch}" for model in timed]
    colours = ["#888888" if _verdict(model, generates) is None else "#2a7de1" for model in timed]
    bars = axis.barh(range(len(timed)), [_time(model, generates) or 0.0 for model in timed], color=colours)
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set_yticks(range(len(timed)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    what = "generated token" if generates else "forward pass"
    axis.set_xlabel(f"milliseconds per {what} (median); grey is dense")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>gblm-compress report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } 
td, th { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left; }
.no { color: #b00; font-weight: bold; } pre { background: #f5f5f5; padding: 1rem; overflow: auto; }
</style>
<h1>gblm-compress report</h1>
<table><tr>{% for c in columns %}<th>{{ c }}{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>{% endfor %}</table>
{% if plot %}<img alt="latency" src="data:image/png;base64,{{ plot }}">{% endif %}
{% if gates %}<h2>Gates</h2><table><tr><th>gate<th>of<th>limit<th>measured<th>lower end<th>holds</tr>
{% for g in gates %}<tr><td>{{ g.gate }}<td>{{ g.subject }}<td>{{ g.limit }}<td>{{ "%.3f" % g.measured }}
<td>{{ "" if g.low is none else "%.3f" % g.low }}
<td{% if not g.passed %} class="no"{% endif %}>{{ "yes" if g.passed else "no" }}</tr>{% endfor %}</table>{% endif %}
<h2>Stages</h2><table><tr><th>stage<th>seconds<th></tr>{% for s in stages %}
<tr><td>{{ s.name }}<td>{{ "%.1f" % s.seconds }}<td>{{ "reused" if s.reused }}</tr>{% endfor %}</table>
<h2>Conditions</h2><pre>{% for k, v in environment.items() %}{{ k }}: {{ v }}
{% endfor %}</pre><h2>Recipe</h2><pre>{{ recipe }}</pre></html>
"""
