"""Dense ONNX exports, the baselines of a benchmark. Those that nobody gives are made once, in the cache folder."""

import time
from functools import partial
from pathlib import Path

from rich.filesize import decimal

from gblm_compress import errors, exporters
from gblm_compress.machine import cache_folder, environment, keep, made_once
from gblm_compress.measure import benchmarking
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import BenchmarkSettings, ComputeSettings, ExportSettings
from gblm_compress.storage import records


def exported(
    models: list[ModelSource],
    baselines: list[ModelSource],
    settings: BenchmarkSettings,
    compute: ComputeSettings,
    progress: Progress,
) -> list[ModelSource]:
    """The dense ONNX exports that a benchmark needs beside `baselines`, after all its checks."""
    where = compute.model_dump()
    errors.raise_all(benchmarking.check(models, baselines, settings, **where))
    missing = benchmarking.to_export(models, baselines, settings, **where)
    wanted = [(dense, settings_of(weights)) for weights, dense in missing.items()]
    errors.raise_all(errors.collect(partial(exporters.check, *each) for each in wanted))
    return [_made(*each, progress) for each in wanted]


def settings_of(weights: str) -> ExportSettings:
    """The export of a dense model with such weights, named as by `manifest.weights_of`."""
    if weights.startswith("int"):
        return ExportSettings(**{"format": "onnx", "quantise": weights})
    dtype, _, arithmetic = weights.partition("/")
    return ExportSettings(format="onnx", dtype=dtype, kernels=bool(arithmetic))  # float16 computed in float32: ours


def _made(dense: ModelSource, settings: ExportSettings, progress: Progress) -> ModelSource:
    found = environment()
    decides = [dense.fingerprint, settings.model_dump(mode="json"), found["packages"], found["gblm_compress"]]
    key = records.hash_of(decides)
    entry, name = cache_folder() / "exports" / key[:16], f"dense-{settings.folder_name}"

    def make(folder: Path) -> None:
        progress.say(f"exporting {dense.name} to {settings.folder_name}, a baseline of the same kind …")
        start = time.perf_counter()
        made = exporters.export(dense, folder / name, settings, progress=progress)
        seconds = time.perf_counter() - start
        progress.say(f"it took {seconds:.0f} s; {decimal(made.bytes)} are kept for later benchmarks in {entry}")

    if entry.is_dir():
        progress.say(f"baseline {name}: an export of {dense.name} from an earlier benchmark, in {entry}")
    keep(made_once(entry, make))
    return ModelSource(name, entry / name)
