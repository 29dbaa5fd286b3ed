"""What the stages of a run share: the recipe and its model, and what a stage says of itself."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from gblm_compress import errors
from gblm_compress.errors import GblmError
from gblm_compress.formats import FORMATS
from gblm_compress.measure.evaluation import Reference
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.budgeting import skeleton_budgets
from gblm_compress.runs.reuse import data_hash
from gblm_compress.settings import CalibrationSettings, ExportSettings, Recipe, RecoverSettings
from gblm_compress.settings.stages import WRITTEN
from gblm_compress.storage import outputs


@dataclass(frozen=True)
class Job:
    """What all stages of a run share.

    Attributes:
        dense: the model of the recipe; where it is not `here` yet, it has no folder to look at, only a name.
        output: folder of the run.
    """

    recipe: Recipe
    dense: ModelSource
    here: bool
    output: Path

    @classmethod
    def without_model(cls, recipe: Recipe, output: Path) -> "Job":
        """A run of whose model only the name is known."""
        name = recipe.model.source
        return cls(recipe, ModelSource(name, Path(name)), False, output)

    @property
    def dtype(self) -> str:
        """What the recipe says of the dtype to compute in; "auto" leaves it to each model."""
        return self.recipe.model.dtype

    @cached_property
    def device(self) -> str:
        """Where the recipe runs; as it asks, where that is absent."""
        absent = errors.collect([partial(loading.choose_device, self.recipe.model.device)])
        return self.recipe.model.device if absent else loading.choose_device(self.recipe.model.device)

    @property
    def written(self) -> Path:
        """The text that the dense model writes, where the recipe has `generate`."""
        return self.output / f"{WRITTEN}.txt"

    def text(self, name: str) -> str:
        """A dataset of the recipe as stages read it."""
        return str(self.written) if name == WRITTEN and self.recipe.generate else name

    def is_given(self, dataset: str) -> bool:
        """Whether a dataset that stages read is there without this run."""
        return self.recipe.generate is None or dataset != str(self.written)

    @cached_property
    def calibration(self) -> CalibrationSettings:
        """What the recipe says of the calibration, with the text that stages read."""
        given = self.recipe.calibration
        return given.model_copy(update={"dataset": self.text(given.dataset)})

    @cached_property
    def recover(self) -> RecoverSettings | None:
        """What the recipe says of the training, with the texts that stages read, and nothing in them that the run
        evaluates on.
        """
        given, evaluate = self.recipe.recover, self.recipe.evaluate
        if given is None:
            return None
        data = tuple(source.model_copy(update={"dataset": self.text(source.dataset)}) for source in given.data)
        evaluated = (*given.disjoint_from, *([evaluate.dataset] if evaluate else []))
        return given.model_copy(update={"data": data, "disjoint_from": tuple(dict.fromkeys(evaluated))})

    @cached_property
    def as_pruned(self) -> ModelSource:
        """What the pruning writes."""
        return ModelSource("pruned", self.output / "pruned")

    @cached_property
    def pruned(self) -> ModelSource:
        """The pruned model that is exported and measured: as it was pruned, or trained after that."""
        return ModelSource("recovered", self.output / "recovered") if self.recipe.recover else self.as_pruned

    @cached_property
    def patterns(self) -> dict[str, Pattern]:
        """{layer: pattern} of what will be pruned; under the recipe's key where the model is not here.

        Raises:
            GblmError: a pattern does not fit a layer, or a name matches none.
        """
        if not self.here:
            return {"prune.pattern": self.recipe.prune.uniform_budget.pattern}
        budgets = skeleton_budgets(loading.load_skeleton(self.dense), self.recipe.prune)
        return {name: budget.pattern for name, budget in budgets.items() if budget.pattern.name != DENSE}

    @cached_property
    def reference(self) -> Reference:
        """The dense model, for all evaluations; `close` it at the end of the run."""
        several = self.recipe.compare or any(map(self.can_run, self.recipe.export))
        folder = self.output if several else None
        return Reference(self.dense, dtype=self.dtype, device=self.device, folder=folder)

    def can_run(self, settings: ExportSettings) -> bool:
        """Whether the device of the run has kernels for an export."""
        on_cuda = "cuda" in self.device
        return on_cuda if FORMATS[settings.format].needs_cuda else not (settings.kernels and on_cuda)

    def bytes_in(self, dtype: str) -> int:
        """Bytes of the dense weights in a dtype."""
        stored = getattr(torch, loading.stored_dtype(self.dense)).itemsize
        return self.dense.bytes_on_disk // int(stored) * int(getattr(torch, dtype).itemsize)


@dataclass(frozen=True)
class Disk:
    """Bytes of weights and logits that a stage writes at most: those that stay, and those beside them while it works.

    A tokenizer and an ONNX graph, which are small beside weights, are not counted.
    """

    stays: int = 0
    meanwhile: int = 0


@dataclass(frozen=True)
class Stage(ABC):
    """One stage of a run."""

    job: Job

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called; no other stage of the run is called so."""

    @property
    @abstractmethod
    def does(self) -> str:
        """What it does, in words."""

    @abstractmethod
    def check(self, progress: Progress) -> list[GblmError]:
        """What is in its way, as far as recipe, machine and a model that is here tell. Nothing is fetched."""

    def disk(self) -> Disk:
        """What disk it takes at most; the model must be here."""
        return Disk()

    @abstractmethod
    def work(self, progress: Progress) -> Any:
        """Do it, and return a frozen result with `as_dict()`."""


@dataclass(frozen=True)
class Recorded(Stage):
    """A stage that is recorded when it is done, and reused while nothing that decides its outcome changes."""

    @property
    def place(self) -> Path | None:
        """The folder or text that it writes; None where its result is all."""
        return None

    def check_place(self) -> None:
        """Raises:
        UsageError: what stands where it will write is none of what it writes.
        """
        if self.place is not None:
            outputs.check_output(self.place, force=True)

    @property
    @abstractmethod
    def reads(self) -> tuple[ModelSource, ...]:
        """The models that it reads, which the stages before it make."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The datasets that it reads, of which a stage before it may make one."""
        return ()

    @abstractmethod
    def decides(self) -> list[Any]:
        """What else decides its outcome, as plain values."""

    def inputs(self) -> list[Any]:
        """Everything that decides its outcome; what it reads must be there."""
        models = [source.fingerprint for source in self.reads]
        return [models, [data_hash(name) for name in self.texts], *self.decides()]


def plain(settings: BaseModel | None) -> Any:
    """Settings as JSON has them."""
    return settings and settings.model_dump(mode="json")
