"""What a model's zeros look like: counts, patterns that hold, row and column structure, and a picture.

Gradient-based masks show structure (whole input columns that matter little, arXiv 2311.04902, section 4); a
table hides it, so `heat_map` draws where weights survive.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm_compress import sources
from gblm_compress.architecture import prunable_layers, weight_matrix
from gblm_compress.errors import UsageError
from gblm_compress.patterns import Pattern
from gblm_compress.progress import Progress
from gblm_compress.sources import ModelSource

CANDIDATES = tuple(Pattern(name) for name in ("1:2", "1:4", "2:4", "2:8", "4:8", "8:16", "16:32"))
BINS = 96  # a panel's resolution: finer than the eye needs, coarse enough to average


@dataclass(frozen=True)
class LayerReport:
    """The structure of one layer's zeros.

    Attributes:
        shape: (out_features, in_features).
        nonzeros: how many weights are not zero.
        patterns: those of `CANDIDATES` that hold exactly.
        empty_rows, empty_columns: outputs and inputs without any weight.
        row_spread, column_spread: standard deviation over rows (columns) of the fraction of survivors.
    """

    name: str
    shape: tuple[int, int]
    nonzeros: int
    patterns: tuple[str, ...]
    empty_rows: int
    empty_columns: int
    row_spread: float
    column_spread: float


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "nonzeros": self.nonzeros, "weights": self.weights}


def inspect(source: ModelSource, heat_map_path: Path | None, progress: Progress) -> InspectResult:
    """Report on every layer that pruning touches (or would touch), and draw the heat map if a path is given."""
    sources.check_model(source, "inspect")
    model = sources.load_model(source)
    layers = [(name, layer) for block in prunable_layers(model) for name, layer in block.items()]
    reports, panels = [], {}
    for name, layer in progress.track(layers, "inspecting", unit="layers"):
        weight = weight_matrix(layer).detach()
        reports.append(report(name, weight))
        if heat_map_path is not None:
            panels[name] = survivors(weight)
    if heat_map_path is not None:
        draw(panels, heat_map_path, source.name)
    return InspectResult(source.name, tuple(reports), str(heat_map_path) if heat_map_path else None)


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
    )


def survivors(weight: Tensor, bins: int = BINS) -> Tensor:
    """The fraction of nonzero weights in each cell of a grid of at most bins × bins over the matrix."""
    alive = (weight != 0).float()[None, None]
    size = (min(bins, weight.shape[0]), min(bins, weight.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(alive, size)[0, 0]


def draw(panels: dict[str, Tensor], path: Path, title: str) -> None:
    """One panel for each kind of layer in the first, the middle and the last block, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks: dict[str, dict[str, Tensor]] = {}
    for name, panel in panels.items():
        block, kind = _split(name)
        blocks.setdefault(block, {})[kind] = panel
    chosen = list(blocks)
    chosen = [chosen[i] for i in sorted({0, len(chosen) // 2, len(chosen) - 1})]
    kinds = list(dict.fromkeys(kind for block in chosen for kind in blocks[block]))
    figure = Figure(figsize=(2.1 * len(kinds) + 0.8, 2.3 * len(chosen) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), len(kinds), squeeze=False)
    image = None
    for row, block in enumerate(chosen):
        for column, kind in enumerate(kinds):
            axis = axes[row][column]
            axis.set_xticks([])
            axis.set_yticks([])
            if kind in blocks[block]:
                image = axis.imshow(
                    blocks[block][kind].numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
                )
            if row == 0:
                axis.set_title(kind, fontsize=8)
            if column == 0:
                axis.set_ylabel(block, fontsize=8)
    figure.suptitle(f"{title}: fraction of weights that survive (rows: outputs, columns: inputs)", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.7)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UsageError(f"heat map {str(path)!r} cannot be written: {error.strerror}") from error


def _split(name: str) -> tuple[str, str]:
    """("model.layers.3", "self_attn.q_proj") of "model.layers.3.self_attn.q_proj"."""
    parts = name.split(".")
    index = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
