"""Exporters: one file each, and one line each in `formats.FORMATS`. See docs/adding-an-exporter.md."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gblm_compress.errors import MissingDependencyError, ModelError, UsageError
from gblm_compress.formats import FORMATS
from gblm_compress.kernels import cpu
from gblm_compress.machine import cost
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.methods.quantisation import columns_of_a_scale
from gblm_compress.methods.zeros import has_negative_zeros, made_zero
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import outputs, records

START_SECONDS = 8.0  # imports and the runtime's start


@dataclass(frozen=True)
class ExportResult(records.Result):
    """Bytes of weights and graphs on disk; `checks` are the results of verification."""

    format: str
    folder: str
    bytes: int
    source_bytes: int
    seconds: float
    checks: dict[str, Any] = field(default_factory=dict)


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool = False, progress: Progress
) -> ExportResult:
    start = time.perf_counter()
    settings, note = decided(settings)
    if note:
        progress.say(f"note: {note}")
    check(source, settings)
    if not progress.quiet:
        progress.say(_estimate(source, settings))
    with outputs.reserved(output, force, [source.folder]):
        checks = _exporter(settings).export(source, output, settings, force=force, progress=progress)
    if note:
        checks["note"] = note
    written = ModelSource(str(output), output).bytes_on_disk
    seconds = time.perf_counter() - start
    return ExportResult(settings.format, str(output), written, source.bytes_on_disk, seconds, checks)


def _estimate(source: ModelSource, settings: ExportSettings) -> str:
    weights, skeleton = loading.count_weights(source), loading.load_skeleton(source)
    seconds = START_SECONDS + FORMATS[settings.format].passes * 4 * weights / cost.bytes_per_second("cpu")
    table = getattr(skeleton.get_input_embeddings(), "weight", torch.empty(0))  # packed from three float32 copies
    memory = weights * _exporter(settings).bytes_a_weight(source, skeleton, settings) + 12 * table.numel()
    return cost.sentence(seconds, memory)


def decided(settings: ExportSettings) -> tuple[ExportSettings, str | None]:
    """Make `kernels` true or false if it is auto. A note says why, if the zeros save no time here."""
    if settings.kernels == "auto":
        try:
            cpu.onnxruntime_library()
        except MissingDependencyError as error:
            dense = settings.model_copy(update={"kernels": False})
            return dense, f"export {dense.folder_name} is dense, so zeros save neither bytes nor time; {error}"
        settings = settings.model_copy(update={"kernels": True})
    is_packed_int4 = (settings.kernels and settings.quantise == "int4") or settings.format.endswith("-int4")
    if is_packed_int4 and cpu.available() and cpu.path(torch.int8) in ("avx2", "avx-vnni", "vnni"):
        return settings, (
            "on this CPU, which has no AVX-512 with VBMI2, 4 bits save bytes, not time: dense 4 bits decode as fast or "
            "faster"
        )
    return settings, None


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None = None) -> None:
    """Raise an error if the export is impossible, without loading weights.

    Args:
        source: the model, or the dense one that it will be made from; None if it does not exist yet.
        patterns: {layer: its pattern} of the layers that will be pruned; None if `source` is the model to export.
    """
    if source is not None:
        loading.check_model(source, "export")
        if (pruning := manifest.read_if_ours(source.folder).get("prune")) and pruning["quantise"] != "none":
            columns = columns_of_a_scale(pruning["quantise"], pruning["group"])
            check_grid(columns, pruning["pattern"] == DENSE, settings)
    _exporter(settings).check(source, settings, patterns)


def check_grid(group: int | None, has_no_zeros: bool, settings: ExportSettings) -> None:
    """Refuse options that contradict the grids of the weights: `group` columns share a scale, or whole rows (None)."""
    own = group or "whole rows"
    if settings.group is not None:
        raise UsageError(f"group {settings.group}: the model was fitted to grids of {own}; leave --group out")
    if has_no_zeros and (settings.kernels or settings.format != "onnx"):
        raise UsageError(
            "the model was rounded with --pattern dense, so it has no zeros to pack; give --format onnx --quantise "
            "without --kernels"
        )
    if settings.format == "onnx" and settings.quantise and not settings.kernels and not has_no_zeros:
        raise UsageError(f"the model was pruned onto grids of {own}, which ONNX Runtime lacks; add --kernels")


def dtype_of(source: ModelSource, settings: ExportSettings) -> str:
    """The dtype of the exported weights; levels compute in float32. The default is the checkpoint's, if possible."""
    if settings.quantise:
        return "float32"
    if settings.dtype != "auto":
        return settings.dtype
    dtypes = FORMATS[settings.format].dtypes
    return stored if (stored := loading.stored_dtype(source)) in dtypes else dtypes[0]


def check_is_pruned(kept: Mapping[str, int], weights: int, itemsize: int) -> None:
    """Refuse layers that keep so many of all `weights` that a mask, of a bit for each, takes more than zeros save."""
    zeros, width = weights - sum(kept.values()), 8 * itemsize
    if zeros * width <= weights:
        raise UsageError(
            f"{100 * zeros / weights:.1f} % of the weights in the {len(kept)} layers are zero, and packed they would "
            f"take more bytes (packing pays from {100 / width:.1f} %): the model is dense; prune it first"
        )


@torch.no_grad()
def drop_signs_of_zeros_(model: nn.Module, layers: Iterable[str]) -> None:
    """Make -0.0 in the weights 0.0. Other tools multiply by a mask, and a packed layer would store each -0.0."""
    for name in layers:
        weight = weight_matrix(model.get_submodule(name))
        if has_negative_zeros(weight):  # a weight that is mapped to its file takes memory when it is written to
            weight.add_(0.0)


def zeros_of_rounding(before: Mapping[str, int], after: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Entries of the checks: the fraction of nonzeros after a rounding, and the number of weights that became zero.

    Args:
        before, after: the nonzeros of each rounded layer.
        sizes: the number of weights of each layer that was pruned and rounded; the fraction is over these layers.
    """
    checks: dict[str, Any] = {}
    if sizes:
        checks["nonzero_fraction"] = sum(after[name] for name in sizes) / sum(sizes.values())
    if (gone := made_zero(before, after)) is not None:
        count, worst, share = gone
        checks |= {"rounded_to_zero": count, "most_rounded_to_zero": f"{worst} ({share:.1%} of its nonzeros)"}
    return checks


def check_nonzeros(source: ModelSource, kept: Mapping[str, int]) -> None:
    """Refuse a pruned layer if the dtype of the export makes most of its nonzeros zero; it keeps so many."""
    if not manifest.is_pruned(source.folder):
        return
    layers = manifest.read(source.folder)["layers"]
    for name, nonzeros in kept.items():
        stated = layers[name]["nonzeros"]
        if 2 * nonzeros < stated:
            raise ModelError(
                f"{name}: {stated - nonzeros} of its {stated} nonzeros would be zero: float16 does not hold such small "
                "numbers; export in float32 or bfloat16"
            )


def _exporter(settings: ExportSettings) -> Any:
    """The module with `check`, `bytes_a_weight` and `export`, which writes a verified folder or none; see the docs."""
    return import_module(FORMATS[settings.format].exporter)
