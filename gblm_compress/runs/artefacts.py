"""The stages of a run that write: a text, the pruned and trained ones, exports."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gblm_compress import errors, exporters, tasks
from gblm_compress.calibration import generation
from gblm_compress.errors import GblmError
from gblm_compress.exporters import check_grid, export
from gblm_compress.formats import FORMATS, Format
from gblm_compress.methods.optimisers import OPTIMISERS
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.placement import Size
from gblm_compress.pruning.stage import prune
from gblm_compress.recovery.stage import check_kind, check_mask, checkpoint_bytes, recover
from gblm_compress.runs.job import Disk, Recorded, plain
from gblm_compress.settings import (
    CalibrationSettings,
    ExportSettings,
    GenerateSettings,
    PruneSettings,
    RecoverSettings,
)
from gblm_compress.storage import outputs

Look = Callable[[], object]


@dataclass(frozen=True)
class Generate(Recorded):
    """Let the dense model write text, for the stages after it."""

    settings: GenerateSettings

    name = "generate"

    @property
    def does(self) -> str:
        return f"let {self.job.dense.name} write {self.settings.tokens:,} tokens"

    @property
    def place(self) -> Path:
        return self.job.written

    @property
    def reads(self) -> tuple[ModelSource, ...]:
        return (self.job.dense,)

    def check_place(self) -> None:
        if self.place.exists():
            outputs.check_file(self.place, ".txt", "text", force=True)

    @property
    def texts(self) -> tuple[str, ...]:
        return () if self.settings.starts is None else (self.settings.starts,)

    def decides(self) -> list[Any]:
        return [plain(self.settings), self.job.device]

    def check(self, progress: Progress) -> list[GblmError]:
        if self.job.here:
            return generation.check(self.job.dense, self.settings)
        return errors.collect(partial(tasks.data_files, name) for name in self.texts)

    def work(self, progress: Progress) -> Any:
        place, device = self.place, self.job.device
        return generation.generate(self.job.dense, place, self.settings, device, progress, force=True)


@dataclass(frozen=True)
class Prune(Recorded):
    """Prune the dense model."""

    settings: PruneSettings
    calibration: CalibrationSettings

    name = "prune"

    @property
    def does(self) -> str:
        return f"prune {self.job.dense.name} by {self.settings.method}, {self.settings.pattern}"

    @property
    def place(self) -> Path:
        return self.job.as_pruned.folder

    @property
    def reads(self) -> tuple[ModelSource, ...]:
        return (self.job.dense,)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.calibration.dataset,) if self.settings.needs_text else ()

    def decides(self) -> list[Any]:
        drawn = self.calibration if self.settings.needs_text else None
        return [plain(self.settings), plain(drawn), self.job.dtype, self.job.device]

    def check(self, progress: Progress) -> list[GblmError]:
        looks = _texts_are_there(self)
        if self.settings.needs_text and self.job.here:
            looks.append(_length_fits(self, self.calibration))
        return errors.collect([*looks, lambda: self.job.patterns])

    def disk(self) -> Disk:
        dtype = loading.choose_dtype(self.job.dtype, self.job.dense, self.job.device)
        size = Size(self.job.dense, dtype, self.settings, self.calibration)
        return Disk(size.checkpoint, size.kept(self.settings))

    def work(self, progress: Progress) -> Any:
        return prune(
            self.job.dense,
            self.place,
            self.settings,
            self.calibration,
            resources=self.job.recipe.resources,
            resume=None,
            dtype=self.job.dtype,
            device=self.job.device,
            force=True,
            progress=progress,
        )


@dataclass(frozen=True)
class Recover(Recorded):
    """Train the pruned model to predict what the dense one does."""

    settings: RecoverSettings

    name = "recover"

    @property
    def does(self) -> str:
        return f"train the pruned model on {self.settings.tokens:,} tokens"

    @property
    def place(self) -> Path:
        return self.job.pruned.folder

    @property
    def reads(self) -> tuple[ModelSource, ...]:
        return (self.job.as_pruned, self.job.dense)

    @property
    def texts(self) -> tuple[str, ...]:
        return self.settings.datasets

    def decides(self) -> list[Any]:
        return [plain(self.settings), self.job.device]

    def check(self, progress: Progress) -> list[GblmError]:
        looks = _texts_are_there(self)
        looks.append(OPTIMISERS[self.settings.optimiser].check)
        if self.job.here:
            length = self.settings.sequence_length
            looks.append(partial(check_kind, self.job.dense))
            looks.append(partial(loading.check_length, self.job.dense, length, "recover.sequence_length"))
        unfit = errors.collect([lambda: self.job.patterns])  # which is the pruning's fault
        if not unfit:
            patterns = {pattern.name for pattern in self.job.patterns.values()}
            looks.append(partial(check_mask, self.settings, patterns, self.job.recipe.prune.grid is not None))
        return errors.collect(looks)

    def disk(self) -> Disk:
        return Disk(self.job.dense.bytes_on_disk, meanwhile=checkpoint_bytes(self.job.dense))

    def work(self, progress: Progress) -> Any:
        return recover(
            self.job.as_pruned,
            self.job.dense,
            self.place,
            self.settings,
            resume=None,
            device=self.job.device,
            force=True,
            progress=progress,
        )


@dataclass(frozen=True)
class Export(Recorded):
    """Export the pruned model, or the dense one that an export of it is timed against."""

    settings: ExportSettings
    of_dense: bool = False

    @property
    def source(self) -> ModelSource:
        """What is exported."""
        return self.job.dense if self.of_dense else self.job.pruned

    @cached_property
    def artefact(self) -> ModelSource:
        """What is written."""
        name = f"dense-{self.settings.folder_name}" if self.of_dense else self.settings.folder_name
        return ModelSource(name, self.job.output / name)

    @property
    def format(self) -> Format:
        """What is said of its format."""
        return FORMATS[self.settings.format]

    @property
    def name(self) -> str:
        return f"export {self.artefact.name}"

    @property
    def does(self) -> str:
        what = f"{self.settings.format} ({self.settings.dtype})"
        if self.of_dense:
            return f"export the dense model to {what}, the baseline of the benchmark"
        return f"export to {what}"

    @property
    def place(self) -> Path:
        return self.artefact.folder

    @property
    def reads(self) -> tuple[ModelSource, ...]:
        return (self.source,)

    def decides(self) -> list[Any]:
        return [plain(self.settings)]

    def check(self, progress: Progress) -> list[GblmError]:
        dense = self.job.dense if self.job.here else None
        unfit = errors.collect([lambda: self.job.patterns])  # which is the pruning's fault
        patterns = {} if unfit or self.of_dense else self.job.patterns
        looks: list[Look] = [partial(exporters.check, dense, self.settings, patterns)]
        pruning = self.job.recipe.prune
        if pruning.grid is not None and not self.of_dense:
            looks.append(partial(check_grid, pruning.columns_of_a_scale, self.settings))
        return errors.collect(looks)

    def disk(self) -> Disk:
        size = self.job.bytes_in(exporters.dtype_of(self.job.dense, self.settings))
        return Disk(size, meanwhile=self.format.copies * size)

    def work(self, progress: Progress) -> Any:
        return export(self.source, self.place, self.settings, force=True, progress=progress)


def _length_fits(stage: Recorded, calibration: CalibrationSettings) -> Look:
    """A look at the windows of the calibration, which the model must take."""
    length = calibration.sequence_length
    return partial(loading.check_length, stage.job.dense, length, "calibration.sequence_length")


def _texts_are_there(stage: Recorded) -> list[Look]:
    """Looks for the texts that a stage reads, as far as the run itself does not make them."""
    task = loading.task_of(stage.job.dense) if stage.job.here else tasks
    return [partial(task.data_files, name) for name in stage.texts if stage.job.is_given(name)]
