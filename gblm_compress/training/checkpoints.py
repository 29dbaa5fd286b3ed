"""Unfinished work, in a hidden folder beside the output until the output is complete; and training checkpoints.

.OUTPUT.recovery/
    run.json                    identity, hashes of the files, and progress at the latest checkpoint
    state-120.0of2.safetensors  weights and Adam's state after step 120, of the tensors that process 0 of 2 owns
    best-3.0of2.safetensors     weights at evaluation 3, the best so far
    states/                     the dense model's predictions, if memory is short
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from gblm_compress import __version__
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import GblmError, OutputError, RankError, UsageError, is_out_of_memory
from gblm_compress.models.checkpoint import read_tensors, save_durably
from gblm_compress.models.files import sha256_of
from gblm_compress.progress import Progress
from gblm_compress.storage import records
from gblm_compress.training.trainer import Progressed, Store

RECORD = "run.json"
CANNOT = ", so the interrupted run cannot be resumed"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    identity: dict[str, Any]  # everything that decides the result
    files: dict[str, str] = {}  # SHA-256 of finished files


class Work:
    """The folder of unfinished work. The first process writes the record; a file counts once its hash is there.

    `names` is a regular expression for the files. `resume`: True continues an interrupted run, False removes its work,
    None continues if the identity is the same. UsageError if the folder belongs to another run or cannot be read, or
    the processes differ in their identity; OutputError if it cannot be written.
    """

    record: Record
    needs_all = True  # a run with a damaged file cannot continue
    any_processes = False  # whether another number of processes can continue

    def __init__(self, folder: Path, new: Record, names: str, resume: bool | None, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        new.identity |= {"processes": ranks.size, "threads": torch.get_num_threads(), "version": __version__}
        ranks.check_same({name: value for name, value in new.identity.items() if name != "threads"})
        self.states = folder / "states" / str(ranks.rank)  # for hidden states, useless after an interruption
        self.damaged: list[str] = []  # files that were changed since, unless `needs_all`
        self.dropped = ""  # the reason, if unfinished work was found and is not continued
        known = self._read(new, names, resume)
        self.resumed = known is not None
        # The record is read once, and then tracked in memory: later the first process may be ahead of the others.
        self.record = known or new
        for name in self.damaged:
            del self.record.files[name]
        ranks.wait()  # before the first process changes anything
        try:
            if ranks.is_first:
                if not self.resumed:
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(folder / "states", ignore_errors=True)
                for path in folder.glob(".tmp*"):
                    path.unlink()
                folder.mkdir(parents=True, exist_ok=True)
            if self.resumed and not self.damaged:
                ranks.wait()
            else:
                self.write()
            self.states.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def write(self) -> None:
        """Write the record, while the other processes wait."""
        if self.ranks.is_first:
            records.write_sealed(self.folder / RECORD, self.record.model_dump(mode="json"))
        self.ranks.wait()

    def remove(self) -> None:
        """Remove the folder. No process waits here: another may have failed, or be busy for long."""
        if self.ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def kept(self, what: str, resume: bool | None, progress: Progress) -> Iterator[None]:
        """Keep the folder, which holds `what`, except after errors that would come again."""
        again = "the same command" if resume is None else "the same command with --resume"
        if self.dropped:
            progress.say(f"{self.dropped}; the run starts over")
        elif resume and not self.resumed:
            progress.say("there is no interrupted run to resume; this run starts from the beginning")
        try:
            yield
        except BaseException as error:
            no_memory, holds_work = is_out_of_memory(error), bool(self.record.files)
            no_disk = isinstance(error, OSError | SafetensorError | OutputError) and not no_memory
            of_files = isinstance(error.__cause__, OSError)  # may be temporary, as with a network share
            passes = no_memory or no_disk or of_files or isinstance(error, KeyboardInterrupt)
            comes_again = isinstance(error, GblmError) and not isinstance(error, RankError) and not passes
            if comes_again or (passes and not holds_work):
                self.remove()
            if no_disk:
                reason = str(error)
                if not isinstance(error, OutputError):
                    reason = f"{str(self.folder)!r} cannot be written ({getattr(error, 'strerror', None) or reason})"
                kept = f"; {what} are kept: make room and run {again}" if holds_work else ""
                raise OutputError(reason + kept) from error
            if passes and holds_work:
                progress.say(f"{what} are kept: {again} continues from there")
            raise

    def _read(self, new: Record, names: str, resume: bool | None) -> Record | None:
        """The record of the run to continue; None to start over."""
        if self.folder.is_symlink():  # its target could not be removed at the end
            raise UsageError(f"{str(self.folder)!r} is reserved for unfinished work, but is a link; move it away")
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        file = re.compile(rf"({names})\.safetensors")
        # What was being written: safetensors begins with .tmp and six characters.
        begun = rf"\.{file.pattern}|\.tmp\w{{6}}|\.run\.json\.\d+|\.gblm-[0-9a-f]{{16}}\.partial-.*"
        other = re.compile(rf"run\.json|states|{begun}")
        for path in entries:
            ours = (file.fullmatch(path.name) and path.is_file()) or other.fullmatch(path.name)
            if path.is_symlink() or not ours:
                raise UsageError(
                    f"{str(self.folder)!r} is reserved for unfinished work, but holds {path.name!r}; move it away"
                )
        if resume is False or not any(path.name == RECORD or file.fullmatch(path.name) for path in entries):
            return None
        try:
            known = type(new).model_validate(records.read_sealed(self.folder / RECORD))
        except (OSError, ValueError):  # pydantic's ValidationError is a ValueError
            return self._drop(resume, f"{str(self.folder / RECORD)!r} is missing or damaged{CANNOT}")
        was, now = known.identity, new.identity
        if was.get("version") != now.get("version"):
            held = f"an interrupted run of version {was.get('version')} (this is {now.get('version')})"
            return self._drop(resume, f"{str(self.folder)!r} holds {held}")
        changed = [key for key in now | was if was.get(key) != now.get(key)]
        if self.any_processes and "processes" in changed:
            changed = [key for key in changed if key not in ("processes", "threads")]
        if changed:
            again = "repeat that run's command"
            if "threads" in changed and "threads" in was:  # sums differ in their last bits
                again += f", with OMP_NUM_THREADS={was['threads']} (torch uses {now['threads']} now)"
            fault = f"{str(self.folder)!r} holds an interrupted run that differs in {', '.join(changed)}"
            return self._drop(resume, fault, f"{again}, or ")
        self.damaged = [name for name, stated in known.files.items() if not self._holds(name, stated)]
        if not (self.damaged and self.needs_all):
            return known
        path, self.damaged = self.folder / self.damaged[0], []
        return self._drop(resume, f"{str(path)!r} is missing or was changed{CANNOT}")

    def _drop(self, resume: bool | None, why: str, instead: str = "") -> Record | None:
        """Start over, and remember why; an error if the run must be resumed."""
        if resume:
            raise UsageError(f"{why}; {instead}leave out --resume to start over")
        self.dropped = why
        return None

    def _holds(self, name: str, stated: str) -> bool:
        path = self.folder / name
        try:
            return path.is_file() and sha256_of(path) == stated
        except OSError:
            return False


class TrainingRecord(Record):
    progress: Progressed | None = None  # at the latest checkpoint


class Checkpoints(Work, Store):
    """The checkpoints of one training. Every process writes its own tensors."""

    record: TrainingRecord
    any_processes = True

    def __init__(self, output: Path, identity: dict[str, Any], resume: bool | None, ranks: Ranks) -> None:
        folder, new = output.with_name(f".{output.name}.recovery"), TrainingRecord(identity=identity)
        super().__init__(folder, new, r"(state|best)-\d+\.\d+of\d+", resume, ranks)
        self.record.identity = new.identity  # with the present number of processes
        for path in self.folder.glob("*.safetensors") if ranks.is_first else ():
            if path.name not in self.record.files:  # written after the latest checkpoint
                path.unlink()
        ranks.wait()

    def load(self) -> tuple[Progressed, dict[str, Tensor]] | None:
        """At least this process's part of the latest checkpoint."""
        latest = deepcopy(self.record.progress)
        return None if latest is None else (latest, self._read_part("state", latest.step))

    def save(self, progress: Progressed, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, then remove the previous one."""
        save_durably(self._file("state", progress.step), tensors)
        self.ranks.wait()
        if self.ranks.is_first:
            files = [*self._written("state", progress.step), *self._written("best", progress.best)]
            known = self.record.files
            self.record.files = {path.name: known.get(path.name) or sha256_of(path) for path in files}
        self.record.progress = deepcopy(progress)
        self.write()
        self._remove_others()

    def save_best(self, look: int, tensors: dict[str, Tensor]) -> None:
        """Write the best weights; the previous ones stay while the latest checkpoint needs them."""
        self._remove_others()
        save_durably(self._file("best", look), tensors)
        self.ranks.wait()

    def best(self, look: int) -> dict[str, Tensor]:
        return self._read_part("best", look)

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number}.{self.ranks.rank}of{self.ranks.size}.safetensors"

    def _written(self, kind: str, number: int) -> list[Path]:
        """The files of all processes."""
        return sorted(self.folder.glob(f"{kind}-{number}.*.safetensors"))

    def _read_part(self, kind: str, number: int) -> dict[str, Tensor]:
        """This process's tensors, or all tensors if another number of processes wrote the files."""
        own = self._file(kind, number)
        paths = [own] if own.exists() else self._written(kind, number)
        return {name: tensor for path in paths for name, tensor in read_tensors(path).items()}

    def _remove_others(self) -> None:
        """Remove unneeded files of this process. The first process removes those of other numbers of processes too."""
        latest, size = self.record.progress, self.ranks.size
        needed = (f"state-{latest.step}.", f"best-{latest.best}.") if latest else ()
        for path in self.folder.glob("*.safetensors"):
            of_others = self.ranks.is_first and not path.name.endswith(f"of{size}.safetensors")
            own = path.name.endswith(f".{self.ranks.rank}of{size}.safetensors")
            if (own or of_others) and not path.name.startswith(needed):
                path.unlink()
