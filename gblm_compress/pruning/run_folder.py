"""The folder of an unfinished run: finished work stays here until the output is whole.

.OUTPUT.pruning/
    run.json                 identity of the run: settings, text, model; budgets once they are known; exceptions
    gradients-7.safetensors  gradient norms of block 7, until it is pruned
    block-7.safetensors      the pruned weights of block 7, in the dtype of computation, and their grids
    distilled-7.safetensors  those after the distillation
    states/                  hidden states that found no room in memory; worthless after an interruption
"""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import OutputError, UsageError
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models import grids
from gblm_compress.models.checkpoint import is_intact, keys, read_tensor, save_durably
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.storage import records
from gblm_compress.storage.resuming import check_identity, own_files

IDENTITY = "run.json"
_TENSORS = re.compile(r"(gradients|block|distilled)-\d+\.safetensors")
_OTHERS = re.compile(  # the record, hidden states, and what is written aside
    r"run\.json|states|\.(gradients|block|distilled)-\d+\.safetensors|\.run\.json\.\d+|"
    r"\.gblm-[0-9a-f]{16}\.partial-.*"
)


class Record(BaseModel):
    """The content of `run.json`."""

    model_config = ConfigDict(extra="forbid")

    identity: dict[str, Any]
    budgets: dict[str, Budget] | None = None
    by_magnitude: list[str] = []
    output_errors: dict[str, float] = {}
    distilled: bool = False


def path_of(output: Path) -> Path:
    """The run folder of an output folder: hidden, beside it."""
    return output.with_name(f".{output.name}.pruning")


class RunFolder:
    """Finished work of a run. Only the first rank writes; the others wait for it.

    `resumed`: it continues an interrupted run. `damaged`: files that were changed since; they are removed, and their
    work is done again.

    Args:
        identity: everything that decides the result, as JSON.
        resume: continue an interrupted run, or with False remove its work. None: continue if the identity is the same.

    Raises:
        UsageError: the folder belongs to a run with another identity, cannot be read, or is not of a run at all.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool | None, ranks: Ranks) -> None:
        self.folder, self._ranks = folder, ranks
        self.states = folder / "states" / str(ranks.rank)
        known = self._read(resume)
        same = known is not None and known.identity == identity
        self.resumed = same and resume is not False
        if known and resume:
            check_identity(folder, known.identity, identity)
        # Files are listed once, and then tracked in memory: later the first rank may be ahead of the others by a file.
        files = self._own_files() if self.resumed else []
        self.damaged = [path.name for path in files if not is_intact(path)]
        self._files = {path.stem for path in files if path.name not in self.damaged}
        self.record = known if known and self.resumed else Record(identity=identity)
        if any(name.startswith("distilled") for name in self.damaged):
            self.record.distilled = False
        ranks.wait()  # before the first rank changes anything
        try:
            if ranks.is_first:
                if not self.resumed:
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir(parents=True)
                for name in self.damaged:
                    (folder / name).unlink()
                shutil.rmtree(folder / "states", ignore_errors=True)
            if self.resumed and not self.damaged:
                ranks.wait()
            else:
                self._write()
            self.states.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def holds_work(self) -> bool:
        return bool(self._files) or self.record.budgets is not None

    @property
    def identity(self) -> dict[str, Any]:
        return self.record.identity

    def decide(self, budgets: dict[str, Budget]) -> None:
        """Keep the budget of each layer."""
        self.record.budgets = budgets
        self._write()

    @property
    def output_errors(self) -> dict[str, float]:
        """{layer: error of its output}; none after the distillation, which changes all weights."""
        return {} if self.record.distilled else self.record.output_errors

    def save_gradients(self, block: int, norms: dict[str, Tensor]) -> None:
        self._save(f"gradients-{block}", norms)

    @property
    def blocks(self) -> int:
        """How many blocks are finished."""
        return sum(name.startswith("block-") for name in self._files)

    def gradients(self, block: int) -> dict[str, Tensor]:
        """{layer: G} of a block that `has_gradients`, else none."""
        return self._load(f"gradients-{block}")

    def has_gradients(self, block: int) -> bool:
        """Whether the gradients were measured, or are not needed any more."""
        return f"gradients-{block}" in self._files or self.has_finished(block)

    def finish(
        self,
        block: int,
        weights: dict[str, Tensor],
        on: Mapping[str, Grid] | None = None,
        results: Mapping[str, LayerResult] | None = None,
    ) -> None:
        """Keep the final weights {layer: weight in its stored layout} of a block, their grids, and the results."""
        results = results or {}
        by_magnitude = {name for name, result in results.items() if result.by_magnitude}
        errors = {name: result.output_error for name, result in results.items() if result.output_error is not None}
        if by_magnitude or errors:
            self.record.by_magnitude = sorted({*self.record.by_magnitude, *by_magnitude})
            self.record.output_errors |= errors
            self._write()
        self._save(f"block-{block}", weights | grids.as_tensors(on or {}))
        self._files.discard(f"gradients-{block}")
        if self._ranks.is_first:
            self._path(f"gradients-{block}").unlink(missing_ok=True)

    def has_finished(self, block: int) -> bool:
        return f"block-{block}" in self._files

    def finished(self, block: int) -> dict[str, Tensor]:
        stored = self._load(self._finished_name(block))
        return {name: stored[name] for name in _layers(stored)}

    def grids(self, block: int, group: int | None) -> dict[str, Grid]:
        """The grids of a finished block, whose scales hold for `group` columns (None: a row)."""
        return grids.read_from(self._path(self._finished_name(block)), group)

    def layers(self, block: int) -> list[str]:
        return _layers(keys(self._path(self._finished_name(block))))

    def finished_layer(self, block: int, name: str) -> Tensor:
        return read_tensor(self._path(self._finished_name(block)), name)

    def finish_distilled(self, per_block: list[dict[str, Tensor]], on: Mapping[str, Grid]) -> None:
        """Keep the distilled weights of all blocks, and their grids: all of them, or none."""
        for block, weights in enumerate(per_block):
            own = {name: on[name] for name in weights if name in on}
            self._save(f"distilled-{block}", weights | grids.as_tensors(own))
        self.record.distilled = True
        self._write()

    def remove(self) -> None:
        """Remove the folder. No rank waits for another here: it may have failed, or be busy for long."""
        if self._ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finished_name(self, block: int) -> str:
        return f"{'distilled' if self.record.distilled else 'block'}-{block}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self._ranks.is_first:
            save_durably(self._path(name), tensors)
        self._files.add(name)
        self._ranks.wait()

    def _load(self, name: str) -> dict[str, Tensor]:
        path = self._path(name)
        return {key: read_tensor(path, key) for key in keys(path)} if name in self._files else {}

    def _own_files(self) -> list[Path]:
        return own_files(self.folder, _TENSORS, _OTHERS)

    def _read(self, resume: bool | None) -> Record | None:
        """The content of `run.json`; None where there is none, or if it is damaged and `resume` is not True."""
        path, files = self.folder / IDENTITY, self._own_files()
        try:
            if not path.exists() and not files:
                return None
            return Record.model_validate(records.read_sealed(path))
        except (OSError, ValueError, UsageError) as error:  # pydantic's ValidationError is a ValueError
            if not resume:
                return None
            raise UsageError(
                f"{str(path)!r} is missing or damaged, so that the interrupted run cannot be resumed; leave out "
                "--resume to start anew"
            ) from error

    def _write(self) -> None:
        if self._ranks.is_first:
            records.write_sealed(self.folder / IDENTITY, self.record.model_dump(mode="json"))
        self._ranks.wait()


def _layers(names: Collection[str]) -> list[str]:
    """The layers of a block among the names of its tensors, without the parts of grids."""
    parts = grids.parts_of(grids.layers_on_grids(names))
    return [name for name in names if name not in parts]
