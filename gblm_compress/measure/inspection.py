"""The zeros of a model: counts, patterns that hold, row and column structure.

Gradient-based masks show structure: whole input columns matter little (arXiv 2311.04902, section 4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.storage import records

CANDIDATES = tuple(Pattern(name) for name in ("1:2", "1:4", "2:4", "2:8", "4:8", "8:16", "16:32"))
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
    kinds: tuple[dict[str, Any], ...]
    nonzeros: int
    weights: int


def inspect(source: ModelSource, progress: Progress) -> InspectResult:
    loading.check_model(source, "inspect")
    model = loading.load_model(source)
    layers = [(name, layer) for block in prunable_layers(model) for name, layer in block.items()]
    each = progress.track(layers, "inspecting", unit="layers")
    reports = [report(name, weight_matrix(layer).detach()) for name, layer in each]
    return InspectResult(
        source.name,
        tuple(reports),
        kinds_of(reports),
        sum(layer.nonzeros for layer in reports),
        sum(math.prod(layer.shape) for layer in reports),
    )


def kinds_of(layers: Sequence[LayerReport]) -> tuple[dict[str, Any], ...]:
    """The layers of each kind of projection, such as `self_attn.q_proj`: how many, and shares of weights and lines."""
    found: dict[str, list[LayerReport]] = {}
    for layer in layers:
        found.setdefault(_kind(layer.name), []).append(layer)
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


def _kind(name: str) -> str:
    """ "self_attn.q_proj" of "model.layers.3.self_attn.q_proj"."""
    parts = name.split(".")
    index = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[index + 1 :])
