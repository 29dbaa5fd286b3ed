"""Work that goes on after an interruption: its hidden folder beside the output, and when that is kept."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from gblm_compress.errors import GblmError, OutputError, RankError, UsageError, is_out_of_memory
from gblm_compress.progress import Progress


class Unfinished(Protocol):
    """The folder of a work that is under way."""

    folder: Path

    @property
    def holds_work(self) -> bool:
        """Whether going on with it would save anything."""

    def remove(self) -> None:
        """Remove it."""


def check_identity(folder: Path, known: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse the folder of a work with another identity."""
    changed = [key for key in identity if known.get(key) != identity[key]]
    if changed or known != identity:
        raise UsageError(
            f"{str(folder)!r} holds an interrupted run with other {', '.join(changed or known)}; give the same command "
            "as then, or leave out --resume to start anew"
        )


def own_files(folder: Path, tensors: re.Pattern[str], others: re.Pattern[str]) -> list[Path]:
    """The files named as `tensors` in a work's folder; UsageError where a further one is not named as `others`."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in entries if tensors.fullmatch(path.name)]
    plain = [path for path in files if path.is_file() and not path.is_symlink()]
    foreign = [path for path in entries if path not in plain and not others.fullmatch(path.name)]
    if foreign:
        raise UsageError(
            f"{str(folder)!r} is where unfinished work is kept, and holds {foreign[0].name!r}; move it away"
        )
    return files


@contextmanager
def kept_where_resuming_helps(work: Unfinished, what: str, resume: bool | None, progress: Progress) -> Iterator[None]:
    """Keep a work's folder, which holds `what`, after interruptions and lack of disk or memory; else remove it."""
    again = "the same command" if resume is None else "the same command with --resume"

    def leave() -> None:
        if work.holds_work:
            progress.say(f"{what} are kept: {again} goes on from there")
        else:
            work.remove()

    try:
        yield
    except KeyboardInterrupt:
        leave()
        raise
    except (OSError, SafetensorError, OutputError) as error:
        if is_out_of_memory(error):
            leave()
            raise
        reason = str(error)
        if not isinstance(error, OutputError):
            reason = f"{str(work.folder)!r} cannot be written ({getattr(error, 'strerror', None) or reason})"
        if not work.holds_work:
            work.remove()
            raise OutputError(reason) from error
        raise OutputError(f"{reason}; {what} are kept: make room and give {again}") from error
    except RankError:
        raise
    except GblmError as error:
        if isinstance(error.__cause__, OSError):  # which may pass: a network share that was away, say
            leave()
        else:
            work.remove()
        raise
    except Exception as error:
        if is_out_of_memory(error):
            leave()
        raise
