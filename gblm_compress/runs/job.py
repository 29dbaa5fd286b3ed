"""The job that stages share, the interface of a stage, and its record on disk.

A recorded stage is reused if nothing changed: neither its key, a hash of all inputs, nor the content of its output.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gblm_compress import exporters, tasks
from gblm_compress.errors import GblmError, ModelError, OutputError, first_line
from gblm_compress.formats import FORMATS
from gblm_compress.machine import environment
from gblm_compress.measure.evaluation import Reference
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import files, loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.planning import uniform_budgets
from gblm_compress.runs.run_report import Outcome
from gblm_compress.settings import BenchmarkSettings, ComputeSettings, ExportSettings, Recipe, RecoverSettings
from gblm_compress.storage import outputs, records

Look = Callable[[], object]
"""Raises an error if something prevents the work."""


@dataclass(frozen=True)
class Job:
    """A recipe, its dense model if it was `found` on this machine, and the run's folder."""

    recipe: Recipe
    found: ModelSource | None
    output: Path
    progress: Progress = field(default_factory=partial(Progress, quiet=True))

    @cached_property
    def dense(self) -> ModelSource:
        """The dense model; only its name, unless it was found."""
        name = self.recipe.model.source
        return self.found or ModelSource(name, Path(name))

    @property
    def compute(self) -> ComputeSettings:
        return ComputeSettings(dtype=self.recipe.model.dtype, device=self.device)

    @cached_property
    def device(self) -> str:
        """The device of the run; the recipe's name for it if the device is absent."""
        try:
            return loading.choose_device(self.recipe.model.device)
        except GblmError:
            return self.recipe.model.device

    @cached_property
    def recover(self) -> RecoverSettings | None:
        """The settings of the training. Its data must not contain the text that the run evaluates on."""
        given, evaluate = self.recipe.recover, self.recipe.evaluate
        if given is None or (self.found and not loading.task_of(self.found).generates):
            return given
        evaluated = (*given.disjoint_from, *([evaluate.dataset] if evaluate else []))
        return given.model_copy(update={"disjoint_from": tuple(dict.fromkeys(evaluated))})

    @cached_property
    def benchmark(self) -> BenchmarkSettings | None:
        """The settings of the benchmark. Without pruning, an export would be its own baseline in as many bits."""
        given = self.recipe.benchmark
        if given is None or self.recipe.prune is not None:
            return given
        return given.model_copy(update={"float_baseline": True})

    def artefact(self, name: str) -> ModelSource:
        return ModelSource(name, self.output / name)

    @cached_property
    def as_pruned(self) -> ModelSource:
        return self.artefact("pruned")

    @cached_property
    def exported(self) -> ModelSource:
        """The model that exports are made from: recovered, pruned, or the dense one."""
        if self.recipe.prune is None:
            return self.dense
        return self.artefact("recovered") if self.recipe.recover else self.as_pruned

    @cached_property
    def measured(self) -> list[ModelSource]:
        """The models that are evaluated and timed against the dense model."""
        made = [] if self.exported is self.dense else [self.exported]
        return made + [self.artefact(each.folder_name) for each in self.runnable]

    @cached_property
    def patterns(self) -> dict[str, Pattern]:
        """{layer: pattern} of the pruning. Raises a GblmError if a pattern fits no layer."""
        if self.recipe.prune is None:
            return {}
        if self.found is None:
            return {"prune.pattern": self.recipe.prune.uniform_budget.pattern}
        budgets = uniform_budgets(loading.load_skeleton(self.dense), self.recipe.prune)
        return {name: budget.pattern for name, budget in budgets.items() if self.recipe.prune.changes(budget.pattern)}

    @cached_property
    def reference(self) -> Reference:
        """The dense model, for all evaluations; `close` it after the run."""
        folder = self.output if self.runnable else None
        return Reference(self.dense, **self.compute.model_dump(), folder=folder)

    @cached_property
    def exports(self) -> list[ExportSettings]:
        """The exports that this machine makes; see `notes`."""
        return list(dict.fromkeys(exporters.decided(each)[0] for each in self.recipe.export))

    @cached_property
    def notes(self) -> list[str]:
        """The reasons for exports that differ from the recipe."""
        return [note for each in self.recipe.export if (note := exporters.decided(each)[1])]

    @cached_property
    def runnable(self) -> list[ExportSettings]:
        """The exports for which the device of the run has kernels."""
        exports = [(each, FORMATS[each.format].needs_cuda, each.kernels) for each in self.exports]
        return [each for each, on_gpu, on_cpu in exports if not (on_cpu if "cuda" in self.device else on_gpu)]

    def looks_at(self, texts: Iterable[str], length: int = 0, key: str = "") -> list[Look]:
        task = loading.task_of(self.found) if self.found else tasks
        looks: list[Look] = [partial(task.data_files, name) for name in texts]
        if length and self.found:
            looks.append(partial(loading.check_length, self.found, length, key))
        return looks


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    does: str  # the work in words
    reads: tuple[ModelSource, ...] = ()
    texts: tuple[str, ...] = ()
    decides: Callable[[], list[Any]]  # settings and plain values that decide the result, besides the inputs
    work: Callable[[], Any]
    looks: Sequence[Look] = ()  # checks before the work
    place: Path | None = None  # the folder that it writes

    def check_place(self) -> None:
        if self.place is not None:
            outputs.check_output(self.place, force=True, inputs=[source.folder for source in self.reads])

    @property
    def key(self) -> str:
        """A hash of everything that decides the result. The inputs must exist."""
        models, texts = [source.fingerprint for source in self.reads], [data_hash(name) for name in self.texts]
        decides = [each.model_dump(mode="json") if isinstance(each, BaseModel) else each for each in self.decides()]
        versions = environment()["packages"] | {"gblm_compress": environment()["gblm_compress"]}
        return records.hash_of([self.name, [models, texts, *decides], versions])


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: str
    content: str | None
    seconds: float
    result: dict[str, Any]

    def holds(self, stage: Stage) -> bool:
        return self.key == stage.key and self.content == _content(stage.place)


def carry_out(stage: Stage, home: Path, progress: Progress) -> Outcome:
    """Reuse the record of a stage in the folder `home` if nothing changed; else do the work and record it."""
    record, key, path = read_record(stage.name, home, progress), stage.key, record_path(stage.name, home)
    if record is not None and record.holds(stage):
        progress.say(f"• {stage.name}: reused")
        return Outcome(stage.name, True, record.seconds, record.result)
    progress.say(f"• {stage.name}")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be replaced: {error.strerror}; remove it") from error
    start = time.perf_counter()
    result = json.loads(json.dumps(stage.work().as_dict()))
    seconds = time.perf_counter() - start
    record = Record(key=key, content=_content(stage.place), seconds=seconds, result=result)
    path.parent.mkdir(exist_ok=True)
    records.write_sealed(path, record.model_dump())
    return Outcome(stage.name, False, seconds, result)


def read_record(stage: str, home: Path, progress: Progress) -> Record | None:
    """The record of a stage; None if there is none, or it is damaged."""
    path = record_path(stage, home)
    if not path.exists():
        return None
    try:
        return Record.model_validate(records.read_sealed(path))
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        progress.say(f"{path} is damaged and ignored ({first_line(error)})")
        return None


def record_path(stage: str, home: Path) -> Path:
    return home / ".stages" / f"{re.sub('[^A-Za-z0-9.+_]', '-', stage)}.json"


def _content(place: Path | None) -> str | None:
    """A fingerprint of a stage's output; None if there is none, or it is damaged."""
    if place is None or not place.exists():
        return None
    try:
        return ModelSource("", place).fingerprint
    except ModelError:
        return None


def data_hash(dataset: str) -> str | None:
    """A hash of a local dataset's content; None for a dataset that is not local."""
    digest, paths = hashlib.sha256(), tasks.data_files(dataset)
    for root, path in ((given, below) for given in paths for below in (given, *sorted(given.rglob("*")))):
        if path.is_file():  # a file's folder may be its label
            name = str(path.relative_to(root.parent))
            digest.update(name.encode() + b"\0" + bytes.fromhex(files.sha256_of(path)))
    return digest.hexdigest() if paths else None
