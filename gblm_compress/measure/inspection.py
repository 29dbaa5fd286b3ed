"""The zeros of a model: counts, patterns that hold, row and column structure, and a picture.

Gradient-based masks show structure: whole input columns matter little (arXiv 2311.04902, section 4).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.printing import plain_figures, printable
from gblm_compress.progress import Progress
from gblm_compress.storage import outputs, records

CANDIDATES = tuple(Pattern(name) for name in ("1:2", "1:4", "2:4", "2:8", "4:8", "8:16", "16:32"))
STRIP = 128  # columns in a line of a panel
KEPT, GONE = 0.9, 0.1  # A row or column is kept if this share of its weights survives, and gone at most that.


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    nonzeros: int
    patterns: tuple[str, ...]  # the `CANDIDATES` that hold exactly
    empty_rows: int
    empty_columns: int
    row_spread: float  # standard deviation over rows of the share of surviving weights
    column_spread: float
    kept_rows: int
    gone_rows: int
    kept_columns: int
    gone_columns: int


@dataclass(frozen=True)
class InspectResult(records.Result):
    model: str
    layers: tuple[LayerReport, ...]
    heat_map: str | None
    kinds: tuple[dict[str, Any], ...]
    nonzeros: int
    weights: int


def inspect(
    source: ModelSource, progress: Progress, heat_map: Path | None = None, force: bool = False
) -> InspectResult:
    loading.check_model(source, "inspect")
    model = loading.load_model(source)
    layers = [(name, layer) for block in prunable_layers(model) for name, layer in block.items()]
    reports, strips = [], {}
    for name, layer in progress.track(layers, "inspecting", unit="layers"):
        weight = weight_matrix(layer).detach()
        reports.append(report(name, weight))
        strips[name] = (weight != 0).float().mean(0)
    if heat_map is not None:
        with outputs.HEAT_MAP.reserved(heat_map, force) as write:
            write(draw(strips, source.name))
    return InspectResult(
        source.name,
        tuple(reports),
        str(heat_map) if heat_map else None,
        kinds_of(reports),
        sum(layer.nonzeros for layer in reports),
        sum(math.prod(layer.shape) for layer in reports),
    )


def kinds_of(layers: Sequence[LayerReport]) -> tuple[dict[str, Any], ...]:
    """The layers of each kind of projection, such as `self_attn.q_proj`: how many, and shares of weights and lines."""
    found: dict[str, list[LayerReport]] = {}
    for layer in layers:
        found.setdefault(_split(layer.name)[1], []).append(layer)
    kinds = []
    for kind, own in found.items():
        rows, columns = (sum(layer.shape[side] for layer in own) for side in (0, 1))
        sizes = {"nonzeros": sum(math.prod(layer.shape) for layer in own)}
        sizes |= {"kept_rows": rows, "gone_rows": rows, "kept_columns": columns, "gone_columns": columns}
        shares = {name: sum(getattr(layer, name) for layer in own) / size for name, size in sizes.items()}
        kinds.append({"kind": kind, "layers": len(own), **shares})
    return tuple(kinds)


def report(name: str, weight: Tensor) -> LayerReport:
    alive = weight != 0
    out_features, in_features = weight.shape
    found: dict[str, Any] = {}
    for side, share in (("row", alive.float().mean(1)), ("column", alive.float().mean(0))):
        found[f"{side}_spread"] = float(share.std(correction=0))
        for what, which in (("empty", share == 0), ("kept", share >= KEPT), ("gone", share <= GONE)):
            found[f"{what}_{side}s"] = int(which.sum())
    holds = [p.name for p in CANDIDATES if p.first_violation(weight) is None]
    shape = out_features, in_features
    return LayerReport(name=name, shape=shape, nonzeros=int(alive.sum()), patterns=tuple(holds), **found)


@plain_figures()
def draw(columns: dict[str, Tensor], title: str) -> bytes:
    """One panel for each kind of layer in the first, the middle and the last block, as PNG.

    A colour is the difference of a column's share of nonzero weights, as in `columns`, from the layer's mean.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, Tensor]] = {}
    for name, strip in columns.items():
        block, kind = _split(name)
        panels.setdefault(block, {})[kind] = strip
    blocks = [list(panels)[i] for i in sorted({0, len(panels) // 2, len(panels) - 1})]
    kinds = list(dict.fromkeys(kind for block in blocks for kind in panels[block]))
    figure = Figure(figsize=(2.6 * len(kinds) + 0.8, 2.3 * len(blocks) + 0.9), layout="constrained")
    axes = figure.subplots(len(blocks), len(kinds), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for (row, block), (column, kind) in product(enumerate(blocks), enumerate(kinds)):
        axis = axes[row][column]
        if kind in panels[block]:
            share = panels[block][kind]
            lines = torch.nn.functional.pad(share, (0, -len(share) % STRIP), value=math.nan).reshape(-1, STRIP)
            mean = float(share.mean())
            reach = max(float((share - mean).abs().max()), 1e-3)  # of the column furthest from the mean
            colours = {"vmin": mean - reach, "vmax": mean + reach, "cmap": "RdBu"}
            image = axis.imshow(lines.numpy(), aspect="auto", interpolation="nearest", **colours)
            figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
        if row == 0:
            axis.set_title(printable(kind), fontsize=8)
        if column == 0:
            axis.set_ylabel(printable(block), fontsize=8)
    heading = f"{title}: share of weights that survive in each input column, {STRIP} columns a line"
    figure.suptitle(printable(heading), fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _split(name: str) -> tuple[str, str]:
    """("model.layers.3", "self_attn.q_proj") of "model.layers.3.self_attn.q_proj"."""
    parts = name.split(".")
    index = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
