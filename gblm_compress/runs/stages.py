"""Stages on record: what is already done is not done again.

A stage's key is a hash of everything that decides its outcome: settings, the content of its inputs, versions, and
for timings the machine. A stage whose key is on record, and whose folder still has the content it had, is reused.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gblm_compress.calibration import text
from gblm_compress.errors import ModelError, OutputError, first_line
from gblm_compress.machine.environment import environment
from gblm_compress.measure import zero_shot
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from gblm_compress.storage import records

STAGES = ".stages"


@dataclass(frozen=True)
class Stage:
    """One stage as it went: whether it was reused, how long it took, and its result as plain values."""

    name: str
    reused: bool
    seconds: float
    result: dict[str, Any]


class _Record(BaseModel):
    """A finished stage, as it is on disk."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: str
    content: str | None
    seconds: float
    result: dict[str, Any]


def run_stage(
    output: Path, name: str, inputs: Any, work: Callable[[], Any], folder: Path | None, progress: Progress
) -> Stage:
    """Reuse the recorded stage if nothing that decides its outcome has changed; else do the work and record it."""
    versions = environment()["packages"] | {"gblm_compress": environment()["gblm_compress"]}
    key = hashlib.sha256(json.dumps([name, inputs, versions], sort_keys=True).encode()).hexdigest()
    record_path = output / STAGES / f"{re.sub('[^A-Za-z0-9.+_]', '-', name)}.json"
    record = _record(record_path, progress)
    if record is not None and record.key == key and record.content == _content(folder):
        progress.say(f"• {name}: reused")
        return Stage(name, True, record.seconds, record.result)
    progress.say(f"• {name}")
    try:
        record_path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(record_path)!r} cannot be replaced: {error.strerror}; remove it") from error
    start = time.perf_counter()
    result = json.loads(json.dumps(work().as_dict()))
    seconds = time.perf_counter() - start
    record = _Record(key=key, content=_content(folder), seconds=seconds, result=result)
    record_path.parent.mkdir(exist_ok=True)
    records.write_sealed(record_path, record.model_dump())
    return Stage(name, False, seconds, result)


def _record(path: Path, progress: Progress) -> _Record | None:
    """What is on record of a stage; None where there is nothing, or nothing that can be read."""
    if not path.exists():
        return None
    try:
        return _Record.model_validate(records.read_sealed(path))
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        progress.say(f"{path} is damaged and ignored ({first_line(error)})")
        return None


def _content(folder: Path | None) -> str | None:
    """A fingerprint of a stage's folder; None where it has none, or it is gone or damaged."""
    if folder is None or not folder.is_dir():
        return None
    try:
        return ModelSource("", folder).fingerprint
    except ModelError:
        return None


def text_hash(dataset: str | None) -> str | None:
    """The content of a local text file, as a hash; the name alone says nothing of it."""
    for path in text.files(dataset or ""):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def evaluation_hash(settings: EvaluateSettings) -> list[Any]:
    """The content of what an evaluation names: its text, and the files of its tasks."""
    return [text_hash(settings.dataset), zero_shot.fingerprint(settings.tasks, settings.include_path)]
