"""The run of a recipe: prune → export → evaluate → benchmark → gates, reusing what is already done.

A stage's key is a hash of everything that decides its outcome: settings, the content of its inputs, versions, and
for timings the machine. A stage whose key is on record, and whose folder still has the content it had, is reused.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gblm_compress import artifact, report, sources
from gblm_compress.benchmarking import benchmark
from gblm_compress.doctor import environment
from gblm_compress.errors import UsageError
from gblm_compress.evaluation import evaluate
from gblm_compress.exporters import export
from gblm_compress.gates import GateOutcome, check_gates
from gblm_compress.progress import Progress
from gblm_compress.pruning import prune
from gblm_compress.settings import ExportSettings, Recipe
from gblm_compress.sources import ModelSource, resolve_model

STAGES = ".stages"


@dataclass(frozen=True)
class Stage:
    """One stage as it went: whether it was reused, how long it took, and its result as plain values."""

    name: str
    reused: bool
    seconds: float
    result: dict[str, Any]


@dataclass(frozen=True)
class RunReport:
    """Everything a run found out; `report.json` is this.

    Attributes:
        rows: the summary table, dense against pruned per runtime and batch size.
        gates: each gate with its limit and what was measured.
    """

    recipe: dict[str, Any]
    output: str
    environment: dict[str, Any]
    stages: list[Stage]
    rows: list[report.Row]
    gates: list[GateOutcome] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


def plan(recipe: Recipe) -> list[str]:
    """The stages that a run of the recipe consists of, in words."""
    steps = [f"prune {recipe.model.source} by {recipe.prune.method}, {recipe.prune.pattern}"]
    for settings in recipe.export:
        steps.append(f"export to {settings.format} ({settings.dtype})")
    for settings in _dense_exports(recipe):
        steps.append(f"export the dense model to {settings.format} ({settings.dtype}), the baseline of the benchmark")
    if recipe.evaluate:
        steps.append(f"evaluate on {recipe.evaluate.dataset}")
    if recipe.benchmark:
        steps.append(f"benchmark in {' and '.join(recipe.benchmark.runtimes)}")
    gates = recipe.gates.model_dump(exclude_none=True)
    if gates:
        steps.append("check gates: " + ", ".join(f"{name} {value:g}" for name, value in gates.items()))
    return steps


def run(recipe: Recipe, output: Path, progress: Progress) -> RunReport:
    """Carry out a recipe and write artefacts and `report.json` to `output`.

    Raises:
        GblmError: of the stage that failed. A failed gate is no exception: see `RunReport.passed`.
    """
    try:
        (output / STAGES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output {str(output)!r} cannot be written: {error.strerror}") from error
    stages: list[Stage] = []
    model, device, dtype = recipe.model, sources.choose_device(recipe.model.device), recipe.model.dtype
    dense = resolve_model(model.source, progress)

    def do(name: str, inputs: Any, work: Callable[[], Any], folder: Path | None = None) -> dict[str, Any]:
        stage = _stage(output, name, inputs, work, folder, progress)
        stages.append(stage)
        return stage.result

    calibration = recipe.calibration if recipe.prune.needs_text else None
    do(
        "prune",
        [dense.fingerprint, _dump(recipe.prune), _dump(calibration), _text(calibration), dtype, device],
        lambda: prune(
            dense, output / "pruned", recipe.prune, recipe.calibration, dtype=dtype, device=device, force=True,
            progress=progress,
        ),
        output / "pruned",
    )  # fmt: skip
    pruned = ModelSource("pruned", output / "pruned")

    def do_export(source: ModelSource, name: str, settings: ExportSettings) -> ModelSource:
        do(
            f"export {name}",
            [source.fingerprint, _dump(settings)],
            lambda: export(source, output / name, settings, force=True, progress=progress),
            output / name,
        )
        return ModelSource(name, output / name)

    exports = [do_export(pruned, _folder_name("", settings), settings) for settings in recipe.export]
    baselines = [dense] + [
        do_export(dense, _folder_name("dense-", settings), settings) for settings in _dense_exports(recipe)
    ]
    models = [pruned] + [source for source in exports if not source.needs_cuda or "cuda" in device]
    evaluations: dict[str, dict[str, Any]] = {}
    if recipe.evaluate is not None:
        settings = recipe.evaluate
        for source in models:
            evaluations[source.name] = do(
                f"evaluate {source.name}",
                [dense.fingerprint, source.fingerprint, _dump(settings), _text(settings), dtype, device],
                lambda source=source: evaluate(  # type: ignore[misc]
                    source, settings, baseline=dense, dtype=dtype, device=device,
                    progress=progress,
                ),
            )  # fmt: skip
    timings: list[dict[str, Any]] = []
    if recipe.benchmark is not None:
        bench = recipe.benchmark
        timings = do(
            "benchmark",
            [[s.fingerprint for s in (*baselines, *models)], _dump(bench), dtype, device, environment()],
            lambda: benchmark(models, baselines, bench, dtype=dtype, device=device, progress=progress),
        )["measurements"]
    result = RunReport(
        recipe=recipe.model_dump(mode="json"),
        output=str(output),
        environment=environment(),
        stages=stages,
        rows=report.rows(dense, pruned, exports, baselines, stages[0].result, evaluations, timings),
        gates=check_gates(recipe.gates, evaluations.get(pruned.name), timings),
    )
    report.write(result.as_dict(), output)
    return result


def _stage(
    output: Path, name: str, inputs: Any, work: Callable[[], Any], folder: Path | None, progress: Progress
) -> Stage:
    """Reuse the recorded stage if nothing that decides its outcome has changed; else do the work and record it."""
    versions = environment()["packages"] | {"gblm_compress": environment()["gblm_compress"]}
    key = hashlib.sha256(json.dumps([name, inputs, versions], sort_keys=True).encode()).hexdigest()
    record_path = output / STAGES / f"{name.replace(' ', '-')}.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    if record.get("key") == key and record.get("content") == _content(folder):
        progress.say(f"• {name}: reused")
        return Stage(name, True, record["seconds"], record["result"])
    progress.say(f"• {name}")
    record_path.unlink(missing_ok=True)
    start = time.perf_counter()
    result = json.loads(json.dumps(work().as_dict()))
    seconds = time.perf_counter() - start
    record = {"key": key, "content": _content(folder), "seconds": seconds, "result": result}
    artifact.write_text(record_path, json.dumps(record, indent=2) + "\n")
    return Stage(name, False, seconds, result)


def _content(folder: Path | None) -> str | None:
    """A fingerprint of a stage's folder; None where it has none or it is gone."""
    return ModelSource("", folder).fingerprint if folder is not None and folder.is_dir() else None


def _dense_exports(recipe: Recipe) -> list[ExportSettings]:
    """The exports of the dense model that the benchmark needs as baselines: one per dtype of the ONNX exports."""
    if recipe.benchmark is None or "onnxruntime" not in recipe.benchmark.runtimes:
        return []
    onnx = (settings for settings in recipe.export if settings.format == "onnx")
    return list(dict.fromkeys(settings.model_copy(update={"sparse": False, "kernels": False}) for settings in onnx))


def _folder_name(prefix: str, settings: ExportSettings) -> str:
    sparse = "-sparse" if settings.sparse else "-kernels" if settings.kernels else ""
    return prefix + settings.format + sparse + ("" if settings.dtype == "auto" else f"-{settings.dtype}")


def _dump(settings: Any) -> Any:
    return settings and settings.model_dump(mode="json")


def _text(settings: Any) -> str | None:
    """The content of a local text file, as a hash; the name alone says nothing of it."""
    path = Path(settings.dataset).expanduser() if settings else None
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
