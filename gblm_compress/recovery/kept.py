"""Checkpoints of a training, from which the same command goes on as if it had never ended.

.OUTPUT.recovery/
    run.json              what the training is, and its latest checkpoint: step, curve, best
    state-120.safetensors weights, masks and Adam's state after step 120
    states/               what the dense model said of windows, where it found no room in memory
"""

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import OutputError, UsageError
from gblm_compress.models.checkpoint import is_intact, keys, read_tensor, save_durably
from gblm_compress.pruning.resuming import check_identity, own_files
from gblm_compress.storage import records

RECORD = "run.json"
_TENSORS = re.compile(r"state-\d+\.safetensors")
_OTHERS = re.compile(  # the record, what the dense model said, and what is written aside
    r"run\.json|states|\.state-\d+\.safetensors|\.run\.json\.\d+"
)


@dataclass(frozen=True)
class Look:
    """One look at the held-out windows.

    Attributes:
        tokens: trained on before.
        loss: mean of the steps since the look before; None at the start.
        held_out: mean KL(dense ‖ student) over held-out windows, in nats per token.
        moved: share of the masks' survivors that are not those of the start.
    """

    tokens: int
    loss: float | None
    held_out: float
    moved: float


@dataclass
class Progressed:
    """How far a training is.

    Attributes:
        step: steps done.
        curve: all looks.
        best: number of the look with the lowest held-out loss.
        since: losses of the steps since the last look.
        seconds: of training, over all runs of it.
    """

    step: int = 0
    curve: list[Look] = field(default_factory=list)
    best: int = 0
    since: list[float] = field(default_factory=list)
    seconds: float = 0.0


def path_of(output: Path) -> Path:
    """The folder of checkpoints of an output folder: hidden, beside it."""
    return output.with_name(f".{output.name}.recovery")


class Kept:
    """The checkpoints of one training. Only the first rank writes.

    Args:
        folder: need not exist.
        identity: everything that decides the outcome, as JSON can hold it.
        resume: go on with what is there; else it is thrown away. None: go on if it is of the same identity.

    Raises:
        UsageError: what is there belongs to another training, cannot be read, or is not of a training at all.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool | None, ranks: Ranks) -> None:
        self.folder, self._identity, self._ranks = folder, identity, ranks
        self.states = folder / "states" / str(ranks.rank)
        known = self._read(resume)
        if known and resume:
            check_identity(folder, known["identity"], identity)
        self._latest = known["progress"] if known and known["identity"] == identity else None
        ranks.wait()
        try:
            if ranks.is_first:
                if self._latest is None:
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(folder / "states", ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            ranks.wait()
            self.states.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error

    @property
    def holds_work(self) -> bool:
        """Whether a checkpoint was written, before this run or by it."""
        return (self.folder / RECORD).exists()

    @property
    def is_there(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._latest is not None

    def load(self) -> tuple[Progressed, dict[str, Tensor]]:
        """The latest checkpoint."""
        assert self._latest is not None
        progress = Progressed(**{**self._latest, "curve": [Look(**look) for look in self._latest["curve"]]})
        path = self._state(progress.step)
        return progress, {name: read_tensor(path, name) for name in keys(path)}

    def save(self, progress: Progressed, tensors: dict[str, Tensor]) -> None:
        """Keep a checkpoint, and remove the one before once this one is whole."""
        if self._ranks.is_first:
            try:
                save_durably(self._state(progress.step), tensors)
                record = {"identity": self._identity, "progress": asdict(progress)}
                records.write_sealed(self.folder / RECORD, record)
                for path in self.folder.glob("state-*.safetensors"):
                    if path != self._state(progress.step):
                        path.unlink()
            except OSError as error:
                raise OutputError(f"{str(self.folder)!r} cannot be written ({error.strerror})") from error
        self._ranks.wait()

    def remove(self) -> None:
        """Remove everything."""
        if self._ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _state(self, step: int) -> Path:
        return self.folder / f"state-{step}.safetensors"

    def _read(self, resume: bool | None) -> dict[str, Any] | None:
        """The record of a whole checkpoint; None where there is none.

        Raises:
            UsageError: it is damaged, and `resume` asks for it; or something else lies there.
        """
        own_files(self.folder, _TENSORS, _OTHERS)
        if resume is False or not (self.folder / RECORD).exists():
            return None
        try:
            known = records.read_sealed(self.folder / RECORD)
            if not isinstance(known["identity"], dict) or not is_intact(self._state(int(known["progress"]["step"]))):
                raise ValueError("its checkpoint is not what was written")
            return known
        except (OSError, ValueError, KeyError, TypeError) as error:
            if resume is None:
                return None
            raise UsageError(
                f"{str(self.folder)!r}: the interrupted training cannot be read ({error}); leave out --resume to start "
                "anew"
            ) from error
