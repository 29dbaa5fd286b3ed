"""Exporters: one file each, and one line each in `formats.FORMATS`. See docs/adding-an-exporter.md."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from gblm_compress.errors import UsageError
from gblm_compress.formats import FORMATS
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models.loading import check_model, stored_dtype
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import outputs

if TYPE_CHECKING:
    from gblm_compress.layouts.values import Floats


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

    `check` is `exporters.check` for its formats. `export` writes the output whole or not at all, reopens and verifies
    what it wrote before that, and returns what verification measured.
    """

    check: Callable[[ModelSource | None, ExportSettings, Mapping[str, Pattern] | None], None]
    export: Callable[..., dict[str, Any]]


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool = False, progress: Progress
) -> ExportResult:
    """Export `source` to `output` with the exporter that `settings.format` names.

    Raises:
        GblmError: as the exporter says.
    """
    start = time.perf_counter()
    check(source, settings)
    with outputs.reserved(output, force, [source.folder]):
        checks = _exporter(settings).export(source, output, settings, force=force, progress=progress)
    written = ModelSource(str(output), output).bytes_on_disk
    seconds = time.perf_counter() - start
    return ExportResult(settings.format, str(output), written, source.bytes_on_disk, seconds, checks)


def dtype_of(source: ModelSource, settings: ExportSettings) -> str:
    """What the exported weights have, or compute in where they are levels: for "auto" the checkpoint's own where the
    format has it."""
    if settings.quantise:
        return "float32"
    if settings.dtype != "auto":
        return settings.dtype
    dtypes = FORMATS[settings.format].dtypes
    return stored if (stored := stored_dtype(source)) in dtypes else dtypes[0]


def check_is_pruned(weights: Mapping[str, Tensor], packed: "Floats") -> None:
    """Refuse to pack what packing would not make smaller: it costs some bits for each weight, and saves the zeros.

    Raises:
        UsageError: so few of the weights are zeros.
    """
    total = sum(weight.numel() for weight in weights.values())
    zeros = total - sum(int((weight != 0).sum()) for weight in weights.values())
    width = 8 * next(iter(weights.values())).element_size()
    each, nonzero = packed.bits(width)
    if total * each + (total - zeros) * nonzero >= total * width:
        pays = 100 * (1 - (width - each) / nonzero)
        raise UsageError(
            f"{100 * zeros / total:.1f} % of the weights in the {len(weights)} layers are zero, and packed they would "
            f"take more bytes (packing pays from {pays:.1f} %): the model is dense; prune it first"
        )


def check_patterns(patterns: Mapping[str, Pattern], needed: str, what: str) -> None:
    """Refuse layers that will not have the N:M pattern that something needs.

    Args:
        patterns: {layer: the pattern that it will have}.

    Raises:
        UsageError: one will not.
    """
    for name, pattern in patterns.items():
        if not _implies(pattern, Pattern(needed)):
            raise UsageError(f"{name}: pattern {pattern.name} is not {needed}, which {what} needs")


def check_weights(weights: Mapping[str, Tensor], needed: str, what: str) -> None:
    """Refuse layers that have not the N:M pattern that something needs.

    Raises:
        UsageError: some have not; the first five are listed.
    """
    pattern = Pattern(needed)
    broken = {name: violation for name, weight in weights.items() if (violation := pattern.first_violation(weight))}
    if broken:
        listed = "\n".join(f"  {name}: {violation}" for name, violation in list(broken.items())[:5])
        more = f"\n  … and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UsageError(
            f"{len(broken)} of {len(weights)} layers are not {needed}, which {what} needs:\n{listed}{more}\n"
            f"prune with `--pattern {needed}` first"
        )


def _implies(pattern: Pattern, needed: Pattern) -> bool:
    """Whether what has the one pattern has the other, an N:M, too: as few nonzeros in each of its aligned groups."""
    (n, m), (most, group) = pattern.n_m or (1, 1), needed.n_m or (1, 1)
    return n * (group // m) <= most if group % m == 0 else n <= most and m % group == 0


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None = None) -> None:
    """Find what makes an export impossible, without loading weights.

    Args:
        source: the model, or the dense one that it will be made from; None where it is not here yet.
        patterns: {layer: its pattern} of those that will be pruned, under any name where `source` is None; None where
            `source` is what will be exported.

    Raises:
        GblmError: as the exporter says.
    """
    if source is not None:
        check_model(source, "export")
    _exporter(settings).check(source, settings, patterns)


def _exporter(settings: ExportSettings) -> Exporter:
    exporter: Exporter = import_module(FORMATS[settings.format].exporter)
    return exporter
