"""Stages on record: what is already done is not done again.

A stage's key is a hash of everything that decides its outcome: settings, the content of its inputs, versions, and
for timings the machine. A stage whose key is on record, and whose folder still has the content it had, is reused.
"""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from gblm_compress import tasks
from gblm_compress.errors import ModelError, OutputError, first_line
from gblm_compress.machine import environment
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.storage import records

STAGES = ".stages"


class Recordable(Protocol):
    """A stage as its record sees it."""

    @property
    def name(self) -> str:
        """What the stage is called; no other one of the same run is called so."""

    @property
    def place(self) -> Path | None:
        """The folder or file that it writes, which a record holds for while its content is as it was; None without
        one.
        """

    def inputs(self) -> Any:
        """Everything that decides the outcome, as plain values. What earlier stages make of it must be there."""

    def work(self, progress: Progress) -> Any:
        """Do it, and return a result with `as_dict()`."""


@dataclass(frozen=True)
class Outcome:
    """One stage as it went: whether it was reused, how long it took, and its result as plain values."""

    name: str
    reused: bool
    seconds: float
    result: dict[str, Any]


class Record(BaseModel):
    """A finished stage, as it is on disk."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: str
    content: str | None
    seconds: float
    result: dict[str, Any]


def carry_out(output: Path, stage: Recordable, progress: Progress) -> Outcome:
    """Reuse the recorded stage if nothing that decides its outcome has changed; else do the work and record it."""
    record, key = read_record(output, stage.name, progress), key_of(stage)
    if record is not None and holds(record, key, stage.place):
        progress.say(f"• {stage.name}: reused")
        return Outcome(stage.name, True, record.seconds, record.result)
    progress.say(f"• {stage.name}")
    path = _path(output, stage.name)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be replaced: {error.strerror}; remove it") from error
    start = time.perf_counter()
    result = json.loads(json.dumps(stage.work(progress).as_dict()))
    seconds = time.perf_counter() - start
    record = Record(key=key, content=_content(stage.place), seconds=seconds, result=result)
    path.parent.mkdir(exist_ok=True)
    records.write_sealed(path, record.model_dump())
    return Outcome(stage.name, False, seconds, result)


def read_record(output: Path, name: str, progress: Progress) -> Record | None:
    """What is on record of a stage; None where there is nothing, or nothing that can be read."""
    path = _path(output, name)
    if not path.exists():
        return None
    try:
        return Record.model_validate(records.read_sealed(path))
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        progress.say(f"{path} is damaged and ignored ({first_line(error)})")
        return None


def holds(record: Record, key: str, place: Path | None) -> bool:
    """Whether a record is of the stage with this key, and what the stage wrote still has the content that it had."""
    return record.key == key and record.content == _content(place)


def key_of(stage: Recordable) -> str:
    """A hash of everything that decides the outcome of a stage."""
    versions = environment()["packages"] | {"gblm_compress": environment()["gblm_compress"]}
    return hashlib.sha256(json.dumps([stage.name, stage.inputs(), versions], sort_keys=True).encode()).hexdigest()


def _path(output: Path, name: str) -> Path:
    return output / STAGES / f"{re.sub('[^A-Za-z0-9.+_]', '-', name)}.json"


def _content(place: Path | None) -> str | None:
    """A fingerprint of what a stage wrote; None where it writes nothing, or that is gone or damaged."""
    if place is None or not place.exists():
        return None
    if place.is_file():
        return data_hash(str(place))
    try:
        return ModelSource("", place).fingerprint
    except ModelError:
        return None


def data_hash(dataset: str) -> str | None:
    """The content of a local dataset, as a hash; the name alone says nothing of it."""
    digest, paths = hashlib.sha256(), tasks.data_files(dataset)
    for root, path in ((given, below) for given in paths for below in (given, *sorted(given.rglob("*")))):
        if path.is_file():
            with path.open("rb") as file:  # its folder may be its label
                name = str(path.relative_to(root.parent))
                digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else None
