"""What a run would do: each stage, whether it is reused, and what disk and time the rest takes. Nothing is written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gblm_compress.models.finding import find_here
from gblm_compress.progress import Progress
from gblm_compress.runs import reuse
from gblm_compress.runs.checks import unchecked
from gblm_compress.runs.job import Disk, Job, Recorded
from gblm_compress.runs.reuse import Record, Recordable
from gblm_compress.runs.stages import Compare, stages_of
from gblm_compress.settings import Recipe
from gblm_compress.storage import outputs

Fate = Literal["do", "reuse", "reuse if its inputs come out the same"]


@dataclass(frozen=True)
class Step:
    """A stage as it would go.

    Attributes:
        does: what it does, in words.
        fate: whether its record is reused; that of a stage which reads what is made anew shows only then.
        disk: what it takes at most, if it is done; None where the model is not here to tell.
        seconds: how long it took when it was last done in this folder; None where that is not on record.
    """

    name: str
    does: str
    fate: Fate
    disk: Disk | None
    seconds: float | None


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        gates: the conditions that are checked at the end.
        free_bytes: of the disk that `output` is on.
        unchecked: models and texts that are not on this machine yet.
    """

    output: str
    steps: list[Step]
    gates: list[dict[str, Any]]
    free_bytes: int
    unchecked: list[str]

    @property
    def to_do(self) -> list[Step]:
        """The steps that are, or may be, done."""
        return [step for step in self.steps if step.fate != "reuse"]

    @property
    def bytes(self) -> int | None:
        """What the run takes of the disk at most; None where the model is not here to tell."""
        disks = [step.disk for step in self.to_do if step.disk is not None]
        if len(disks) < len(self.to_do):
            return None
        return sum(disk.stays for disk in disks) + max((disk.meanwhile for disk in disks), default=0)

    @property
    def seconds(self) -> float | None:
        """How long what is to do took when it was last done; None where that is not on record for all of it."""
        known = [step.seconds for step in self.to_do if step.seconds is not None]
        return sum(known) if len(known) == len(self.to_do) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "bytes": self.bytes, "seconds": self.seconds}


def dry_run(recipe: Recipe, output: Path, progress: Progress) -> DryRun:
    """Look at what a run would find in `output`.

    Raises:
        GblmError: a file that the recipe names cannot be read.
    """
    dense = find_here(recipe.model.source)
    job = Job.without_model(recipe, output) if dense is None else Job(recipe, dense, True, output)
    steps: list[Step] = []
    made_anew: set[Path] = set() if job.here else {job.dense.folder}
    for stage in stages_of(job):
        disk = stage.disk() if job.here else None
        if isinstance(stage, Recorded):
            known = made_anew.isdisjoint([*(source.folder for source in stage.reads), *map(Path, stage.texts)])
            steps.append(_step(output, stage, stage.does, known, disk, progress))
            if stage.place is not None and steps[-1].fate != "reuse":
                made_anew.add(stage.place)
        elif isinstance(stage, Compare):
            for cell in stage.cells():
                known = job.here and Path(cell.calibration.dataset) not in made_anew
                steps.append(_step(stage.home, cell, f"compare: {cell.name}", known, disk, progress))
    gates = [group.model_dump(mode="json", exclude_none=True) for group in recipe.gates]
    return DryRun(str(output), steps, gates, outputs.free_bytes(output), unchecked(recipe))


def _step(home: Path, stage: Recordable, does: str, known: bool, disk: Disk | None, progress: Progress) -> Step:
    """A stage with its record in `home`; `known` says whether the models that it reads are there already."""
    record = reuse.read_record(home, stage.name, progress)
    return Step(stage.name, does, _fate(record, stage, known), disk, record.seconds if record else None)


def _fate(record: Record | None, stage: Recordable, known: bool) -> Fate:
    if record is None:
        return "do"
    if not known:
        return "reuse if its inputs come out the same"
    return "reuse" if reuse.holds(record, reuse.key_of(stage), stage.place) else "do"
