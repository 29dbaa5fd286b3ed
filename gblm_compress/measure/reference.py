"""The dense model as the reference of evaluations: what it answers is computed once for all of them."""

import errno
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gblm_compress.measure import zero_shot
from gblm_compress.measure.runtimes import Runtime, load_runtime
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from gblm_compress.storage import outputs
from gblm_compress.tasks.task import Sample, fingerprint

MOST_KEPT = 16 << 30
"""Bytes of logits that are kept at most. Memory seldom caches more, and disks are slow."""

Answers = dict[str, tuple[str, list[float]]]


def ask(source: ModelSource, runtime: Any, settings: EvaluateSettings, progress: Progress) -> Answers:
    """A model's answers to the tasks of an evaluation: see `zero_shot.answers`.

    Args:
        runtime: the loaded `source`, in torch.
    """
    progress.say(f"asking {source.name} …")
    tokenizer = loading.load_processor(source)
    return zero_shot.answers(runtime.model, tokenizer, settings.tasks, settings.limit, settings.include_path, progress)


class Reference:
    """A dense model that several evaluations are held against.

    It is loaded when something is asked that it has not answered yet. Logits are kept in float32, as they were
    computed, in a file without a name, which the system removes with the process; where there is no more room, they
    are computed again for each evaluation.
    """

    def __init__(
        self, source: ModelSource, *, dtype: str = "auto", device: str = "auto", folder: Path | None = None
    ) -> None:
        """Args:
        folder: where the logits are kept; None keeps none, for a single evaluation.
        """
        self.source = source
        self._dtype, self._device, self._folder = dtype, device, folder
        self._runtime: Runtime | None = None
        self._file: IO[bytes] | None = None
        self._left = 0
        self._kept: dict[str, tuple[int, torch.Size]] = {}  # by sample: place in the file and shape
        self._answers: dict[tuple[Any, ...], Answers] = {}

    @property
    def room(self) -> int:
        """Bytes of logits that it keeps at most, if nobody else fills the disk."""
        return 0 if self._folder is None else min(MOST_KEPT, outputs.free_bytes(self._folder) // 2)

    def judged(self, sample: Sample, progress: Progress) -> Tensor:
        """What of the model's prediction for a sample is judged, [positions, …] in float32: see `Task.judged`."""
        key = fingerprint([sample])
        if key in self._kept:
            return self._read(*self._kept[key])
        judged = loading.task_of(self.source).judged(self._loaded(progress).predict(sample), sample).contiguous()
        if self._folder is not None:
            self._keep(key, judged)
        return judged

    def answers(self, settings: EvaluateSettings, progress: Progress) -> Answers:
        """As `ask`."""
        asked = (settings.tasks, settings.limit, settings.include_path)
        if asked not in self._answers:
            self._answers[asked] = ask(self.source, self._loaded(progress), settings, progress)
        return self._answers[asked]

    def unload(self) -> None:
        """Free the memory that the model takes; what it answered stays."""
        self._runtime = None

    def close(self) -> None:
        """Free memory and file."""
        self.unload()
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _loaded(self, progress: Progress) -> Runtime:
        if self._runtime is None:
            progress.say(f"loading {self.source.name} …")
            device = loading.choose_device(self._device)
            dtype = loading.choose_dtype(self._dtype, self.source, device)
            self._runtime = load_runtime(self.source, dtype, device, torch.get_num_threads())
        return self._runtime

    def _keep(self, key: str, logits: Tensor) -> None:
        if self._file is None:
            self._left = self.room
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - `close` closes it
        if logits.nbytes > self._left:
            return
        try:
            place = self._file.seek(0, os.SEEK_END)
            if self._file.write(logits.numpy().data) < logits.nbytes:
                raise OSError(errno.ENOSPC, "no space is left")
        except OSError:  # others filled the disk meanwhile
            self._left = 0
            return
        self._left -= logits.nbytes
        self._kept[key] = place, logits.shape

    def _read(self, place: int, shape: torch.Size) -> Tensor:
        assert self._file is not None
        content = bytearray(4 * shape.numel())
        self._file.seek(place)
        self._file.readinto(content)  # type: ignore[attr-defined]
        return torch.frombuffer(content, dtype=torch.float32).view(shape)
