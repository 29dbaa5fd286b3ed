"""What a model's zeros look like: counts, patterns that hold, row and column structure, and a picture.

Gradient-based masks show structure (whole input columns that matter little, arXiv 2311.04902, section 4); a
table hides it, so `draw` shows how many weights survive in each column.
"""

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import OutputError
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.printing import plain_figures, printable
from gblm_compress.progress import Progress
from gblm_compress.storage import outputs

CANDIDATES = tuple(Pattern(name) for name in ("1:2", "1:4", "2:4", "2:8", "4:8", "8:16", "16:32"))
STRIP = 128  # columns in a line of a panel
KEPT, GONE = 0.9, 0.1
"""A row or column survives if at least so much of its weights do, and vanishes if at most so much do."""


@dataclass(frozen=True)
class LayerReport:
    """The structure of one layer's zeros.

    Attributes:
        shape: (out_features, in_features).
        nonzeros: how many weights are not zero.
        patterns: those of `CANDIDATES` that hold exactly.
        empty_rows, empty_columns: outputs and inputs without any weight.
        row_spread, column_spread: standard deviation over rows (columns) of the fraction of survivors.
        kept_rows, kept_columns: how many survive, see `KEPT`.
        gone_rows, gone_columns: how many vanish, see `GONE`.
    """

    name: str
    shape: tuple[int, int]
    nonzeros: int
    patterns: tuple[str, ...]
    empty_rows: int
    empty_columns: int
    row_spread: float
    column_spread: float
    kept_rows: int
    gone_rows: int
    kept_columns: int
    gone_columns: int


@dataclass(frozen=True)
class KindReport:
    """All layers of one kind of projection, which each block has one of.

    Attributes:
        kind: the layer's name within its block.
        layers: how many there are.
        nonzeros: the fraction of weights that are not zero.
        kept_rows, gone_rows, kept_columns, gone_columns: fractions of all rows and columns.
    """

    kind: str
    layers: int
    nonzeros: float
    kept_rows: float
    gone_rows: float
    kept_columns: float
    gone_columns: float

    @classmethod
    def of(cls, kind: str, layers: list[LayerReport]) -> "KindReport":
        rows, columns = (sum(layer.shape[side] for layer in layers) for side in (0, 1))
        return cls(
            kind=kind,
            layers=len(layers),
            nonzeros=sum(layer.nonzeros for layer in layers) / sum(math.prod(layer.shape) for layer in layers),
            kept_rows=sum(layer.kept_rows for layer in layers) / rows,
            gone_rows=sum(layer.gone_rows for layer in layers) / rows,
            kept_columns=sum(layer.kept_columns for layer in layers) / columns,
            gone_columns=sum(layer.gone_columns for layer in layers) / columns,
        )


@dataclass(frozen=True)
class InspectResult:
    """All layers of a model."""

    model: str
    layers: tuple[LayerReport, ...]
    heat_map: str | None

    @property
    def nonzeros(self) -> int:
        """Nonzeros over all layers."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights over all layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def kinds(self) -> tuple[KindReport, ...]:
        """What the layers have in common, by the kind of projection."""
        found: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            found.setdefault(_split(layer.name)[1], []).append(layer)
        return tuple(KindReport.of(kind, layers) for kind, layers in found.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kinds = [asdict(kind) for kind in self.kinds]
        return {**asdict(self), "kinds": kinds, "nonzeros": self.nonzeros, "weights": self.weights}


def inspect(source: ModelSource, heat_map: Path | None, progress: Progress, *, force: bool = False) -> InspectResult:
    """Report on every layer that pruning touches (or would touch).

    Args:
        heat_map: the PNG to draw, if any.
        force: replace it where it exists.

    Raises:
        UsageError: the picture cannot be drawn there; nothing is loaded then.
        ModelError: the folder is an export, or for no task that is known.
    """
    if heat_map is not None:
        outputs.check_file(heat_map, ".png", "heat map", force)
    loading.check_model(source, "inspect")
    model = loading.load_model(source)
    layers = [(name, layer) for block in prunable_layers(model) for name, layer in block.items()]
    reports, strips = [], {}
    for name, layer in progress.track(layers, "inspecting", unit="layers"):
        weight = weight_matrix(layer).detach()
        reports.append(report(name, weight))
        strips[name] = survivors(weight)
    if heat_map is not None:
        draw(strips, heat_map, source.name)
    return InspectResult(source.name, tuple(reports), str(heat_map) if heat_map else None)


def report(name: str, weight: Tensor) -> LayerReport:
    """The structure of the zeros of one weight [out_features, in_features]."""
    alive = weight != 0
    out_features, in_features = weight.shape
    nonzeros = int(alive.sum())
    per_row, per_column = alive.float().mean(1), alive.float().mean(0)
    holds = [p.name for p in CANDIDATES if p.fits(in_features) and p.first_violation(weight) is None]
    return LayerReport(
        name=name,
        shape=(out_features, in_features),
        nonzeros=nonzeros,
        patterns=tuple(holds),
        empty_rows=int((per_row == 0).sum()),
        empty_columns=int((per_column == 0).sum()),
        row_spread=float(per_row.std(correction=0)),
        column_spread=float(per_column.std(correction=0)),
        kept_rows=int((per_row >= KEPT).sum()),
        gone_rows=int((per_row <= GONE).sum()),
        kept_columns=int((per_column >= KEPT).sum()),
        gone_columns=int((per_column <= GONE).sum()),
    )


def survivors(weight: Tensor) -> Tensor:
    """The fraction of nonzero weights in each column (input) of [out_features, in_features]."""
    return (weight != 0).float().mean(0)


def as_strips(columns: Tensor, width: int = STRIP) -> Tensor:
    """Columns side by side, in lines below each other like text, [lines, width]; NaN where the last line ends."""
    lines = -(-len(columns) // width)
    return torch.nn.functional.pad(columns, (0, lines * width - len(columns)), value=math.nan).reshape(lines, width)


def scale(columns: Tensor) -> tuple[float, float]:
    """The range of a panel's colours: the layer's mean in the middle, the column that is furthest from it at an end."""
    mean = float(columns.mean())
    reach = max(float((columns - mean).abs().max()), 1e-3)
    return mean - reach, mean + reach


@plain_figures()
def draw(columns: dict[str, Tensor], path: Path, title: str) -> None:
    """One panel for each kind of layer in the first, the middle and the last block, as PNG: a cell is a column of the
    weight, and its colour how far the column's density is from the layer's mean.

    At N:M a cell that averages over whole groups would show N/M everywhere; a single column is free to survive or not.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks: dict[str, dict[str, Tensor]] = {}
    for name, strip in columns.items():
        block, kind = _split(name)
        blocks.setdefault(block, {})[kind] = strip
    chosen = list(blocks)
    chosen = [chosen[i] for i in sorted({0, len(chosen) // 2, len(chosen) - 1})]
    kinds = list(dict.fromkeys(kind for block in chosen for kind in blocks[block]))
    figure = Figure(figsize=(2.6 * len(kinds) + 0.8, 2.3 * len(chosen) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), len(kinds), squeeze=False)
    for row, block in enumerate(chosen):
        for column, kind in enumerate(kinds):
            axis = axes[row][column]
            axis.set_xticks([])
            axis.set_yticks([])
            if kind in blocks[block]:
                strip = blocks[block][kind]
                low, high = scale(strip)
                image = axis.imshow(
                    as_strips(strip).numpy(), vmin=low, vmax=high, cmap="RdBu", aspect="auto", interpolation="nearest"
                )
                figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
            if row == 0:
                axis.set_title(printable(kind), fontsize=8)
            if column == 0:
                axis.set_ylabel(printable(block), fontsize=8)
    heading = f"{title}: share of weights that survive in each input column, {STRIP} columns a line"
    figure.suptitle(printable(heading), fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise OutputError(f"heat map {str(path)!r} cannot be written: {error.strerror}") from error


def _split(name: str) -> tuple[str, str]:
    """("model.layers.3", "self_attn.q_proj") of "model.layers.3.self_attn.q_proj"."""
    parts = name.split(".")
    index = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
