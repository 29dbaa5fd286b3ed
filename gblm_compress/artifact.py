"""Folders and files on disk: written aside and renamed into place, held by one process, replaced only if ours.

Every folder that this program makes for a user carries `gblm_manifest.json`, which lists what was written into it. A
folder is replaced only if it carries one, holds nothing beside what is listed, and is no input of the work.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import SoftFileLock, Timeout
from rich.filesize import decimal
from safetensors import SafetensorError

from gblm_compress.errors import OutputError, UsageError

MANIFEST = "gblm_manifest.json"
FILES, KIND = "files", "kind"  # keys of the manifest: what the folder holds, and what it is
SEAL = "sha256"  # key of a record: the hash of its other keys
_LARGEST_JSON = 256 << 20
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
        _restore_predecessor(folder)
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
        Path(tempfile.mkdtemp(prefix=_beside(folder, "probe-"), dir=_existing_parent(folder))).rmdir()
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def check_replaceable(folder: Path, force: bool) -> None:
    """Raises:
    UsageError: the folder is there and not empty, and `force` is not given or it holds what is not ours.
    """
    if not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()}
    if not found:
        return
    if not force:
        raise UsageError(f"output {str(folder)!r} exists; give another folder, or --force to replace it")
    try:
        written = read_json(folder / MANIFEST)[FILES]
    except (OSError, ValueError, KeyError):
        written = None
    if not isinstance(written, list) or MANIFEST not in written:
        raise UsageError(
            f"output {str(folder)!r} exists and was not made by this program (it has no {MANIFEST} that lists its "
            "files), so --force does not replace it; give another folder, or remove it yourself"
        )
    if foreign := sorted(found - {name for name in written if isinstance(name, str)}):
        raise UsageError(
            f"output {str(folder)!r} holds {foreign[0]!r}, which this program did not write, so --force does not "
            "replace it; move that file, or give another folder"
        )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises:
    OutputError: less than `needed` bytes are free where `folder` will be.
    """
    place = _existing_parent(folder)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{str(place)!r} has {decimal(free)} free; {decimal(needed)} may be needed for {what}; free some, or write "
            "elsewhere with -o"
        )


def check_picture(path: Path, force: bool) -> None:
    """Raises:
    UsageError: `path` does not end in .png, is a folder, exists, or lies where nothing can be written.
    """
    if path.suffix != ".png":
        raise UsageError(f"heat map {str(path)!r}: a PNG is drawn; give a name that ends in .png")
    if path.exists() and not path.is_file():
        raise UsageError(f"heat map {str(path)!r} is no file; give another name")
    if path.exists() and not force:
        raise UsageError(f"heat map {str(path)!r} exists; give another file, or --force to replace it")
    if not path.parent.is_dir():
        raise UsageError(f"heat map {str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"heat map {str(path)!r} cannot be written: {str(path.parent)!r} is read-only")


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


@contextmanager
def atomic_folder(folder: Path, *, force: bool = False, inside: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; on success it takes `folder`'s place, else it goes.

    A manifest in it is completed with the list of what was written.

    Args:
        force: replace a folder that is there, if it is ours.
        inside: a folder on the same file system for the temporary one, if not beside `folder`.

    Raises:
        OutputError: the folder cannot be created, filled or renamed, or what stands in its place meanwhile may not be
            replaced.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_beside(folder, "partial-"), dir=inside or folder.parent))
    except OSError as error:
        raise OutputError(f"output {str(folder)!r} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        _list_files(temporary)
        _open_to_umask(temporary)
        try:
            check_replaceable(folder, force)
        except UsageError as error:  # it was free when the work began
            raise OutputError(str(error)) from error
        _replace(folder, temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"output {str(folder)!r} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: there is no such regular file, or it cannot be read.
        ValueError: its content is no JSON object; the message says why.
    """
    if not path.is_file():  # never wait for a pipe or read a device
        raise FileNotFoundError(f"{path.name} is missing or no regular file")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"it is larger than {_LARGEST_JSON >> 20} MiB")
    try:
        content = json.loads(path.read_bytes().decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def write_text(path: Path, content: str) -> None:
    """Write a file whole or not at all, whatever happens to process or machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(content)
            to_disk(file)
        rename_durably(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a record of our own as JSON, durably, with a hash of its content: see `read_sealed`."""
    write_text(path, json.dumps({SEAL: _seal(content), **content}, indent=2) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a record that `write_sealed` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it is not what was written, to the last value.
    """
    content = read_json(path)
    if content.pop(SEAL, None) != _seal(content):
        raise ValueError("its content is not that of which it states the hash")
    return content


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_json(content: Any) -> str:
    """JSON that every reader takes: what is not finite, a perplexity for instance, is null."""
    return json.dumps(_finite(content), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_disk(file: IO[Any]) -> None:
    """Flush and fsync."""
    file.flush()
    os.fsync(file.fileno())


def rename_durably(source: Path, target: Path) -> None:
    """Rename within a folder, and fsync the folder before going on."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _beside(folder: Path, what: str) -> str:
    """A name for what lies beside an output folder for a time: that of no other output, and nobody else's."""
    return f".gblm-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:16]}.{what}"


def _replaced(folder: Path) -> Path:
    """Where the predecessor of a folder is while its successor takes its place."""
    return folder.with_name(_beside(folder, "replaced"))


def _replace(folder: Path, temporary: Path) -> None:
    """Rename `temporary` to `folder`; what stood there is kept until its successor is in place."""
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = _replaced(folder)
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed left half-written beside a folder, which this process has locked."""
    for path in (_replaced(folder), *folder.parent.glob(_beside(folder, "partial-*"))):
        shutil.rmtree(path, ignore_errors=True)


def _restore_predecessor(folder: Path) -> None:
    """Put back what a process had set aside that was killed before its successor was in place."""
    if _replaced(folder).is_dir() and not folder.exists():
        _replaced(folder).rename(folder)


def _list_files(folder: Path) -> None:
    path = folder / MANIFEST
    if path.exists():
        content = read_json(path) | {FILES: sorted(entry.name for entry in folder.iterdir())}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


def _open_to_umask(folder: Path) -> None:
    """mkdtemp and safetensors create private files; give the result the permissions of ordinary ones."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
