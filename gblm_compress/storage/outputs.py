"""Whether a folder may be written, and holding it for one process while it is."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout
from rich.filesize import decimal

from gblm_compress.errors import OutputError, UsageError
from gblm_compress.storage.folders import KIND, MANIFEST, beside, check_replaceable, remove_partial, restore_predecessor
from gblm_compress.storage.records import read_json, write_text

_LONGEST_NAME = 240  # bytes; file systems take 255, and what lies beside an output has a longer name
_NAMELESS_LOCK_S = 5.0  # an owner writes its number into a new lock at once


@contextmanager
def reserved(folder: Path, force: bool, inputs: Iterable[Path] = (), first: bool = True) -> Iterator[None]:
    """Hold an output folder for this process while the `with` runs, after making sure that it may be written.

    A lock beside the folder keeps other processes off. The lock of a process that is gone is taken over, and what that
    process left half-written is removed.

    Args:
        force: an existing folder may be replaced, if it is ours.
        inputs: files and folders that the work reads.
        first: whether this process is the one that writes; of several on one run the others only look.

    Raises:
        UsageError: the folder is in use, is in the way, or cannot be created.
    """
    if not first:
        check_output(folder, force, inputs)
        yield
        return
    with _locked(folder):
        restore_predecessor(folder)
        remove_partial(folder)
        check_output(folder, force, inputs)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    place = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow a link, and lock its target)
    if not place.name:
        raise UsageError(f"output {str(folder)!r} is the root of the file system; give a folder below it")
    created = _make_parents(place)
    lock = SoftFileLock(place.parent.resolve() / f".{place.name}.lock")
    try:
        try:
            _acquire(lock)
        except Timeout as error:
            raise UsageError(
                f"output {str(folder)!r} is being written by process {lock.pid or '?'}; wait, or give another folder "
                f"(the lock is {lock.lock_file})"
            ) from error
        except OSError as error:
            raise _cannot_be_written(folder, error) from error
        yield
    finally:
        if lock.is_locked:
            lock.release()
        for parent in created:
            with suppress(OSError):
                parent.rmdir()


def _acquire(lock: SoftFileLock) -> None:
    """Take the lock at once or not at all. One that has named no process for a while is that of a process which died
    before it could, and is removed; others of dead processes are filelock's to take over.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout:
        marker = Path(lock.lock_file)
        if lock.pid is not None or time.time() - marker.stat().st_mtime < _NAMELESS_LOCK_S:
            raise
        marker.unlink(missing_ok=True)
        lock.acquire(timeout=0)


def check_output(folder: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder that is in the way or cannot be written, before any work is done.

    Raises:
        UsageError: it is or holds an input or the current folder, is a file, exists and may not be replaced, or cannot
            be created.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"output {str(folder)!r} is no Unicode name; give one that is") from error
    try:
        if len(os.fsencode(folder.name)) > _LONGEST_NAME:
            raise UsageError(
                f"output {str(folder)!r} has a name of more than {_LONGEST_NAME} bytes; give a shorter one"
            )
        if _is_or_holds(folder, Path.cwd()):
            raise UsageError(f"output {str(folder)!r} is where you are, and would be replaced; give a folder below it")
        if folder.name in ("", ".."):
            raise UsageError(f"output {str(folder)!r} has no name of its own; give the name of a folder")
        for path in inputs:
            if _is_or_holds(folder, path):
                what = "is" if folder.samefile(path) else "holds"
                raise UsageError(f"output {str(folder)!r} {what} the input {str(path)!r}; give another folder")
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "a link" if folder.is_symlink() else "a file"
            raise UsageError(f"output {str(folder)!r} is {kind}; give a folder that does not exist yet")
        check_replaceable(folder, force)
        # Permissions do not tell all (root, read-only and virtual file systems): only trying does.
        Path(tempfile.mkdtemp(prefix=beside(folder, "probe-"), dir=_existing_parent(folder))).rmdir()
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises:
    OutputError: less than `needed` bytes are free where `folder` will be.
    """
    free = free_bytes(folder)
    if free < needed:
        raise OutputError(
            f"{str(_existing_parent(folder))!r} has {decimal(free)} free; {decimal(needed)} may be needed for {what}; "
            "free some, or write elsewhere with -o"
        )


def free_bytes(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    return shutil.disk_usage(_existing_parent(folder)).free


def check_file(path: Path, suffix: str, what: str, force: bool = False) -> None:
    """Refuse a file to write, before any work is done.

    Args:
        what: the file, in words.
        force: an existing file may be replaced.

    Raises:
        UsageError: `path` does not end in `suffix`, is a folder, exists, or lies where nothing can be written.
    """
    if path.suffix != suffix:
        raise UsageError(f"{what} {str(path)!r}: give a name that ends in {suffix}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{what} {str(path)!r} is no file; give another name")
    if path.exists() and not force:
        raise UsageError(f"{what} {str(path)!r} exists; give another file, or --force to replace it")
    if not path.parent.is_dir():
        raise UsageError(f"{what} {str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{what} {str(path)!r} cannot be written: {str(path.parent)!r} is read-only")


@contextmanager
def reserved_file(path: Path, suffix: str, what: str, force: bool = False) -> Iterator[None]:
    """Hold a file to write for this process while the `with` runs; see `check_file` and `reserved`."""
    check_file(path, suffix, what, force)
    with _locked(path):
        check_file(path, suffix, what, force)
        yield


def check_document(path: Path, mark: str) -> None:
    """Refuse a file to write, before any work is done: one of our own documents or an empty file may be replaced.

    Args:
        mark: what our own document has among its first characters.

    Raises:
        UsageError: `path` is no file, is a file of another kind, or lies where nothing can be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{str(path)!r} is a link or no file; give another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{str(path)!r} cannot be written: {str(path.parent)!r} is no folder, or is read-only")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            beginning = file.read(500)
        if beginning and mark not in beginning:
            raise UsageError(f"{str(path)!r} exists and was not written by this program; give another name")


def check_workable(folder: Path, kind: str) -> None:
    """Refuse a folder for `working_in`, before any work is done; nothing is created.

    Raises:
        UsageError: it is a link, holds something else than work of that kind, or cannot be written.
    """
    try:
        if folder.is_symlink():
            raise UsageError(f"output {str(folder)!r} is a link; give the folder itself")
        if folder.exists() and not _is_empty(folder) and _kind_of_work(folder) != kind:
            raise UsageError(
                f"output {str(folder)!r} exists and is not the folder of a {kind}; give a folder that is new or empty"
            )
        Path(tempfile.mkdtemp(prefix=_PROBE, dir=folder if folder.exists() else _existing_parent(folder))).rmdir()
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


_PROBE = ".gblm-probe-"


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there but what another process leaves for a moment, which is about to work in it too."""
    return all(path.name.startswith((_PROBE, f".{MANIFEST}.")) for path in folder.iterdir())


def _kind_of_work(folder: Path) -> Any:
    """What the manifest of a folder says it is; None where it says nothing that can be read."""
    try:
        return read_json(folder / MANIFEST).get(KIND)
    except (OSError, ValueError):
        return None


@contextmanager
def working_in(folder: Path, kind: str) -> Iterator[None]:
    """Hold a folder that is worked in over several calls, of a kind ("run", "comparison"), while the `with` runs.

    Raises:
        UsageError: it is in use, holds something else, or cannot be written.
    """
    with _locked(folder):
        is_new = not folder.exists()
        _claim(folder, kind)
        try:
            yield
        finally:
            if is_new and [path.name for path in folder.iterdir()] == [MANIFEST]:  # nothing came of it
                shutil.rmtree(folder)


def _claim(folder: Path, kind: str) -> None:
    check_workable(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = _is_empty(folder)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    if empty:
        write_text(folder / MANIFEST, json.dumps({KIND: kind}, indent=2) + "\n")


def _is_or_holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it, whatever links or spellings lead there."""
    if not folder.exists():
        return False
    path = path.resolve()
    return any(candidate.exists() and folder.samefile(candidate) for candidate in (path, *path.parents))


def _cannot_be_written(folder: Path, error: OSError) -> UsageError:
    try:
        place = f" in {str(_existing_parent(folder))!r}"
    except OSError:  # a name that no folder can have
        place = ""
    return UsageError(f"output {str(folder)!r} cannot be written: {error.strerror or error}{place}")


def _make_parents(folder: Path) -> list[Path]:
    """Create the folder that `folder` will lie in; what was created, deepest first."""
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    return missing


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
