"""What exports of levels of 8 or 4 bits refuse, whatever they write."""

from gblm_compress.errors import UsageError
from gblm_compress.models.grids import read_grids
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import ExportSettings


def check(source: ModelSource | None, settings: ExportSettings) -> None:
    """Raises:
    UsageError: a group is asked for, or another form than that of its grids, and the model's weights lie on grids.
    ModelError: its grids are damaged.
    """
    if source is None or not (settings.group or settings.quantise) or not (grids := read_grids(source)):
        return
    own = next(iter(grids.values())).group or "whole rows"
    if settings.group is not None:
        raise UsageError(f"group {settings.group}: the model was pruned onto grids of {own}; leave --group out")
    if settings.format == "onnx" and not settings.kernels:
        raise UsageError(f"the model was pruned onto grids of {own}, which ONNX Runtime does not have; add --kernels")
