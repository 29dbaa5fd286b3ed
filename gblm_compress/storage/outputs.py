"""Output folders: checked before the work, held by one process at a time, and whole or absent.

A folder is replaced only if its `gblm_manifest.json` lists all that it holds. Checks raise UsageError before any work
is done; a folder that cannot be written later raises OutputError.
"""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal
from safetensors import SafetensorError

from gblm_compress.errors import OutputError, UsageError
from gblm_compress.storage.records import read_json, write_file

MANIFEST = "gblm_manifest.json"
FILES, KIND = "files", "kind"  # keys of the manifest: the folder's files and its kind

_LONGEST_NAME = 240  # bytes; file systems take 255, and temporary names beside an output are longer
_PROBE = ".gblm-probe-"


@contextmanager
def reserved(folder: Path, force: bool, inputs: Iterable[Path] = (), first: bool = True) -> Iterator[None]:
    """Hold an output folder for this process while the `with` runs, after checking that it may be written.

    A lock beside it keeps other processes off; half-written files of a dead process are removed. Of several processes
    on one run, only the `first` writes; the others check.
    """
    with _locked(folder) if first else nullcontext():
        if first:
            remove_partial(folder)
        check_output(folder, force, inputs)
        yield


@contextmanager
def working_in(folder: Path, kind: str) -> Iterator[None]:
    """Hold a folder that several calls work in, of a kind ("run", "comparison"), while the `with` runs."""
    with _locked(folder):
        is_new = not folder.exists()
        check_workable(folder, kind)
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            empty = _is_empty(folder)
        if empty:
            write_file(folder / MANIFEST, json.dumps({KIND: kind}, indent=2) + "\n")
        try:
            yield
        finally:
            if is_new and [path.name for path in folder.iterdir()] == [MANIFEST]:  # nothing came of it
                shutil.rmtree(folder)


@contextmanager
def atomic_folder(folder: Path, *, force: bool = False, inside: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; on success it takes `folder`'s place, else it is removed.

    A manifest in it gets the list of its files. `inside` is another place for the temporary folder, on its file system.
    """
    temporary = (inside or folder.parent) / f"{beside(folder, 'partial-')}{secrets.token_hex(8)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        manifest = temporary / MANIFEST
        if manifest.exists():
            content = read_json(manifest) | {FILES: sorted(path.name for path in temporary.iterdir())}
            manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # safetensors creates private files; the mode of the folder, made with mkdir, follows the umask.
        mode = temporary.stat().st_mode & 0o777
        for path in temporary.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
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


def beside(folder: Path, what: str) -> str:
    """The name of a temporary path beside an output folder."""
    return f".gblm-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:16]}.{what}"


def remove_partial(folder: Path) -> None:
    """Remove leftovers of a killed process beside a locked folder; a replaced folder comes back if it is missing."""
    aside = folder.with_name(beside(folder, "replaced"))
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    for path in (aside, *folder.parent.glob(beside(folder, "partial-*"))):
        shutil.rmtree(path, ignore_errors=True)


def _replace(folder: Path, temporary: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = folder.with_name(beside(folder, "replaced"))
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_output(folder: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that holds an input or the current folder, may not be replaced, or cannot be created."""
    _check_name(folder)
    with _writable(folder):
        if _is_or_holds(folder, Path.cwd()):
            raise UsageError(
                f"output {str(folder)!r} is the current folder, and would be replaced; give a folder below it"
            )
        if folder.name in ("", ".."):
            raise UsageError(f"output {str(folder)!r} has no name of its own; give the name of a folder")
        for path in inputs:
            if _is_or_holds(folder, path):
                what = "is" if folder.samefile(path) else "holds"
                raise UsageError(f"output {str(folder)!r} {what} the input {str(path)!r}; give another folder")
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "link" if folder.is_symlink() else "file"
            raise UsageError(f"output {str(folder)!r} is a {kind}; give a folder that does not exist yet")
        check_replaceable(folder, force)
        # Permissions do not tell all (root, read-only and virtual file systems): only trying does.
        Path(tempfile.mkdtemp(prefix=beside(folder, "probe-"), dir=_existing_parent(folder))).rmdir()


def _check_name(folder: Path) -> None:
    """Refuse a name that is too long, or that libraries cannot write weights to."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"output {str(folder)!r} is not a Unicode name; give one that is") from error
    _check_length(folder, f"output {str(folder)!r}")


def _check_length(path: Path, named: str) -> None:
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise UsageError(f"{named} has a name of more than {_LONGEST_NAME} bytes; give a shorter one")


def check_replaceable(folder: Path, force: bool) -> None:
    """Refuse a folder that is not empty, unless `force` is given and all of it is ours."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not found:
        return
    if not force:
        raise UsageError(f"output {str(folder)!r} exists; give another folder, or --force to replace it")
    written = _said(folder, FILES)
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


def check_workable(folder: Path, kind: str) -> None:
    """Refuse a folder for `working_in` that is a link, holds other work, or cannot be written; nothing is created."""
    _check_name(folder)
    with _writable(folder):
        if folder.is_symlink():
            raise UsageError(f"output {str(folder)!r} is a link; give the folder itself")
        if folder.exists() and not _is_empty(folder) and _said(folder, KIND) != kind:
            raise UsageError(
                f"output {str(folder)!r} exists and is not the folder of a {kind}; give a folder that is new or empty"
            )
        Path(tempfile.mkdtemp(prefix=_PROBE, dir=_existing_parent(folder))).rmdir()


def check_space(folder: Path, needed: int, what: str) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise OutputError(
            f"{str(_existing_parent(folder))!r} has {decimal(free)} free; {decimal(needed)} may be needed for {what}; "
            "free some, or write elsewhere with -o"
        )


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(_existing_parent(folder)).free


@dataclass(frozen=True)
class Document:
    what: str  # its name in messages
    suffix: str  # of its files' names; "" for any
    header: str = ""  # its first characters; a file that begins so is ours, and is replaced without `force`

    def check(self, path: Path, force: bool = False) -> None:
        """Refuse a file that has another suffix, may not be replaced, or cannot be written."""
        named = f"{self.what} {str(path)!r}"
        if self.suffix and path.suffix != self.suffix:
            raise UsageError(f"{named}: give a name that ends in {self.suffix}")
        _check_length(path, named)
        with _writable(path):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise UsageError(f"{named} is a link or not a file; give another name")
            if not path.parent.is_dir():
                raise UsageError(f"{named} cannot be written: there is no folder {str(path.parent)!r}")
            if not os.access(path.parent, os.W_OK):
                raise UsageError(f"{named} cannot be written: {str(path.parent)!r} is read-only")
            if not path.exists():
                return
            if not self.header and not force:
                raise UsageError(f"{named} exists; give another file, or --force to replace it")
            if self.header and path.stat().st_size and not self._begins(path):
                raise UsageError(f"{named} exists and was not written by this program; give another file")

    def _begins(self, path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(self.header.encode())) == self.header.encode()

    @contextmanager
    def reserved(self, path: Path, force: bool = False) -> Iterator[Callable[[str | bytes], None]]:
        """Hold the name for this process while the `with` runs; yields a function that writes the file whole."""

        def write(content: str | bytes) -> None:
            try:
                self.check(path, force)
            except UsageError as error:  # it was free when the work began
                raise OutputError(str(error)) from error
            write_file(path, content)

        self.check(path, force)
        with _locked(path):
            self.check(path, force)
            yield write


HEAT_MAP = Document("heat map", ".png")
SUMMARY = Document("summary", "", "<!-- gblm-compress -->\n")  # $GITHUB_STEP_SUMMARY has no suffix
JUNIT = Document("JUnit file", ".xml", "<?xml version='1.0' encoding='utf-8'?>\n<testsuite name=\"gblm-compress: ")
_HEAD = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content='
PAGE = Document("page", ".html", f'{_HEAD}"gblm-compress">\n')


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        with ExitStack() as held:
            with _writable(folder):
                folder.absolute().parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_beside(folder))
            yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def lock_beside(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock while the `with` runs, after waiting for at most `wait_s` seconds.

    The kernel frees the lock of a process that dies.
    """
    place = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow a link, and lock its target)
    if not place.name:
        raise UsageError(f"output {str(folder)!r} is the root of the file system; give a folder below it")
    marker = place.parent.resolve() / f".{place.name}.lock"
    lock = FileLock(marker, timeout=wait_s, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another process is writing to {str(folder)!r}; wait, or give another name") from error
    try:
        yield
    finally:
        with suppress(OSError):
            marker.unlink()  # while it is held: whoever opened it meanwhile sees that it has gone, and tries again
        lock.release()


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there but locks, and temporary files of a process that is about to work in it."""
    passing = (_PROBE, f".{MANIFEST}.")
    return all(
        path.name.startswith(passing) or (path.name.startswith(".") and path.suffix == ".lock")
        for path in folder.iterdir()
    )


def _said(folder: Path, key: str) -> object:
    try:
        return read_json(folder / MANIFEST).get(key)
    except (OSError, ValueError):
        return None


def _is_or_holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it, whatever links or spellings lead there."""
    path = path.resolve()
    return folder.exists() and any(each.exists() and folder.samefile(each) for each in (path, *path.parents))


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a UsageError: the output cannot be written."""
    try:
        yield
    except OSError as error:
        try:
            place = f" in {str(_existing_parent(folder))!r}"
        except OSError:  # a name that no folder can have
            place = ""
        raise UsageError(f"output {str(folder)!r} cannot be written: {error.strerror or error}{place}") from error


def _existing_parent(folder: Path) -> Path:
    place = folder.absolute()
    return next(each for each in (place, *place.parents) if each.exists())
