"""The zeros of a model: counts, patterns that hold, empty rows and columns."""

import math
from dataclasses import dataclass

from torch import Tensor

from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.storage import records

CANDIDATES = tuple(Pattern(name) for name in ("1:2", "1:4", "2:4", "2:8", "4:8", "8:16", "16:32"))


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    nonzeros: int
    patterns: tuple[str, ...]  # the `CANDIDATES` that hold exactly
    empty_rows: int
    empty_columns: int


@dataclass(frozen=True)
class InspectResult(records.Result):
    model: str
    layers: tuple[LayerReport, ...]
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
        sum(layer.nonzeros for layer in reports),
        sum(math.prod(layer.shape) for layer in reports),
    )


def report(name: str, weight: Tensor) -> LayerReport:
    alive = weight != 0
    out_features, in_features = weight.shape
    return LayerReport(
        name=name,
        shape=(out_features, in_features),
        nonzeros=int(alive.sum()),
        patterns=tuple(pattern.name for pattern in CANDIDATES if pattern.first_violation(weight) is None),
        empty_rows=int((~alive.any(1)).sum()),
        empty_columns=int((~alive.any(0)).sum()),
    )
