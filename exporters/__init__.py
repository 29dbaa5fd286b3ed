"""Exporters: one file each, and one line each in `EXPORTERS`. See docs/adding-an-exporter.md."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from gblm_compress.errors import UsageError
from gblm_compress.progress import Progress
from gblm_compress.sources import ModelSource

# Imported on use, so that no exporter's packages are needed by another's.
EXPORTERS = {
    "bitmask": "gblm_compress.exporters.bitmask",
    "onnx": "gblm_compress.exporters.onnx",
    "semi-structured": "gblm_compress.exporters.semi_structured",
}


@dataclass(frozen=True)
class ExportResult:
    """The outcome of an export.

    Attributes:
        bytes: size of the weights and graphs on disk.
        source_bytes: the same of the model that was exported.
        checks: what verification measured, in the exporter's own terms.
    """

    format: str
    folder: str
    bytes: int
    source_bytes: int
    seconds: float
    checks: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Exporter(Protocol):
    """What the module of an exporter provides.

    `export` writes `output` whole or not at all, and reopens and verifies what it wrote before that.
    """

    export: Callable[..., ExportResult]


def export(
    source: ModelSource,
    output: Path,
    format: str,
    *,
    dtype: str = "auto",
    force: bool = False,
    progress: Progress,
) -> ExportResult:
    """Export `source` to `output` with the exporter of that name.

    Args:
        dtype: of the exported weights; "auto" is the checkpoint's own.

    Raises:
        UsageError: there is no such exporter.
        GblmError: as the exporter says.
    """
    if format not in EXPORTERS:
        raise UsageError(f"format {format!r} is not known; give one of {', '.join(EXPORTERS)}")
    exporter: Exporter = import_module(EXPORTERS[format])
    return exporter.export(source, output, dtype=dtype, force=force, progress=progress)
