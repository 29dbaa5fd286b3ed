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
    if source is not None and (settings.group or settings.quantise) and (grids := read_grids(source)):
        check_grid(next(iter(grids.values())).group, settings)


def check_grid(group: int | None, settings: ExportSettings) -> None:
    """Args:
        group: columns that share a scale of the grids that the weights lie on; None where all of a row do.

    Raises:
        UsageError: another group is asked for, or another form than that of such grids.
    """
    own = group or "whole rows"
    if settings.group is not None:
        raise UsageError(f"group {settings.group}: the model was pruned onto grids of {own}; leave --group out")
    if settings.format == "onnx" and settings.quantise and not settings.kernels:
        raise UsageError(f"the model was pruned onto grids of {own}, which ONNX Runtime does not have; add --kernels")
