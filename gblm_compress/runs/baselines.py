"""Dense ONNX exports, the baselines of a benchmark. Missing ones are made once, in the cache folder."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.filesize import decimal

from gblm_compress import errors, exporters
from gblm_compress.machine import cache_folder, environment, keep, made_once
from gblm_compress.measure.benchmarking import Contest
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import records


def completed(contest: Contest, progress: Progress) -> Contest:
    """The contest, with its missing dense ONNX exports among the baselines, after all checks."""
    errors.raise_all(contest.faults())
    wanted = [(dense, settings_of(weights)) for weights, dense in contest.missing().items()]
    errors.raise_all(errors.collect(partial(exporters.check, *each) for each in wanted))
    return replace(contest, baselines=[*contest.baselines, *(_made(*each, progress) for each in wanted)])


def settings_of(weights: str) -> ExportSettings:
    """The export of a dense model with such weights, named as by `manifest.weights_of`."""
    if weights.startswith("int"):
        return ExportSettings(**{"format": "onnx", "quantise": weights})
    dtype, _, arithmetic = weights.partition("/")  # only this package's operators compute float16 in float32
    return ExportSettings(format="onnx", dtype=dtype, kernels=bool(arithmetic))


def _made(dense: ModelSource, settings: ExportSettings, progress: Progress) -> ModelSource:
    found = environment()
    decides = [dense.fingerprint, settings.model_dump(mode="json"), found["packages"], found["gblm_compress"]]
    entry, name = cache_folder() / "exports" / records.hash_of(decides)[:16], f"dense-{settings.folder_name}"

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
