"""Checkpoints of a recovery. A resumed training ends with the same bits.

.OUTPUT.recovery/
    run.json                settings and inputs; step, curve and best look of the latest checkpoint
    state-120.0.safetensors weights and Adam's state after step 120, of the tensors that process 0 owns
    best-3.0.safetensors    weights at look 3, the best so far
    states/                 the dense model's predictions, if memory is short
"""

import re
import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import OutputError, UsageError
from gblm_compress.models.checkpoint import is_intact, keys, read_tensor, save_durably
from gblm_compress.storage import records
from gblm_compress.storage.resuming import check_identity, own_files
from gblm_compress.training.trainer import Look, Progressed, Store

RECORD = "run.json"
_TENSORS = re.compile(r"(state|best)-\d+\.\d+\.safetensors")
_OTHERS = re.compile(  # the record, the dense model's predictions, temporary files
    r"run\.json|states|\.(state|best)-\d+\.\d+\.safetensors|\.run\.json\.\d+"
)


def path_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.recovery")


class Checkpoints(Store):
    """The checkpoints of one training. Every rank writes its own tensors, the first rank the record.

    Args:
        identity: everything that decides the outcome, as JSON values.
        resume: True goes on, False starts anew, None goes on if the identity is the same.

    Raises:
        UsageError: the folder holds another training, other files, or a damaged record.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool | None, ranks: Ranks) -> None:
        self.folder, self._identity, self._ranks = folder, identity, ranks
        self.states = folder / "states" / str(ranks.rank)
        self.latest = self._read(resume)
        ranks.wait()
        try:
            if ranks.is_first:
                if self.latest is None:
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(folder / "states", ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            ranks.wait()
            self.states.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error

    @property
    def holds_work(self) -> bool:
        return (self.folder / RECORD).exists()

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def load(self) -> tuple[Progressed, dict[str, Tensor]] | None:
        """This rank's part of the latest checkpoint."""
        if self.latest is None:
            return None
        path = self._file("state", self.latest.step)
        return deepcopy(self.latest), {name: read_tensor(path, name) for name in keys(path)}

    def save(self, progress: Progressed, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, then remove the previous one."""
        self._write("state", progress.step, tensors)
        if self._ranks.is_first:
            record = {"identity": self._identity, "progress": asdict(progress)}
            records.write_sealed(self.folder / RECORD, record)
        self.latest = deepcopy(progress)
        self._ranks.wait()
        self._remove_all_but("state", progress.step)
        self._remove_all_but("best", progress.best)

    def save_best(self, look: int, tensors: dict[str, Tensor]) -> None:
        """Write the best weights; the previous ones stay while the latest checkpoint needs them."""
        recorded = [self.latest.best] if self.latest else []
        self._remove_all_but("best", *recorded)
        self._write("best", look, tensors)

    def best(self, look: int) -> dict[str, Tensor]:
        path = self._file("best", look)
        return {name: read_tensor(path, name) for name in keys(path)}

    def remove(self) -> None:
        if self._ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, kind: str, number: int, rank: int | None = None) -> Path:
        return self.folder / f"{kind}-{number}.{self._ranks.rank if rank is None else rank}.safetensors"

    def _write(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        try:
            save_durably(self._file(kind, number), tensors)
        except OSError as error:
            raise OutputError(f"{str(self.folder)!r} cannot be written ({error.strerror})") from error
        self._ranks.wait()

    def _remove_all_but(self, kind: str, *numbers: int) -> None:
        left = {self._file(kind, number) for number in numbers}
        for path in self.folder.glob(f"{kind}-*.{self._ranks.rank}.safetensors"):
            if path not in left:
                path.unlink()

    def _read(self, resume: bool | None) -> Progressed | None:
        own_files(self.folder, _TENSORS, _OTHERS)
        if resume is False or not (self.folder / RECORD).exists():
            return None
        try:
            known = records.read_sealed(self.folder / RECORD)
            plain = known["progress"]
            progress = Progressed(**{**plain, "curve": [Look(**look) for look in plain["curve"]]})
            files = [
                self._file(kind, int(number), rank)
                for kind, number in (("state", progress.step), ("best", progress.best))
                for rank in range(self._ranks.size)
            ]
            if known["identity"] == self._identity:
                if not all(map(is_intact, files)):
                    raise ValueError("its checkpoint is not what was written")
                return progress
            if resume:
                check_identity(self.folder, dict(known["identity"]), self._identity)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if resume:
                raise UsageError(
                    f"{str(self.folder)!r}: the interrupted training cannot be read ({error}); leave out --resume to "
                    "start anew"
                ) from error
        return None
