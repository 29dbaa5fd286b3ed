"""Folders on disk: written aside and renamed into place, so that none is ever seen half-written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gblm_compress.errors import OutputError, UsageError


def check_output(folder: Path, force: bool) -> None:
    """Refuse an output folder that exists or cannot be written, before any work is done.

    Raises:
        UsageError: it exists and `force` is not given, is a file, or cannot be created.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"output {str(folder)!r} is where you are, and would be replaced; give a folder below it")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {str(folder)!r} is a file; give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UsageError(f"output {str(folder)!r} exists; give another folder, or --force to replace it")
    parent = _existing_parent(folder)
    try:  # permissions do not tell all (root, read-only and virtual file systems): only trying does
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise UsageError(f"output {str(folder)!r} cannot be written: {error.strerror} in {str(parent)!r}") from error


@contextmanager
def atomic_folder(folder: Path, inside: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; on success it takes `folder`'s place, else it goes.

    Args:
        inside: a folder on the same file system for the temporary one, if not beside `folder`.

    Raises:
        OutputError: the folder cannot be created, filled or renamed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=inside or folder.parent))
    except OSError as error:
        raise OutputError(f"output {str(folder)!r} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        _open_to_umask(temporary)
        _replace(folder, temporary)
    except OSError as error:
        raise OutputError(f"output {str(folder)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, content: str) -> None:
    """Write a file whole or not at all, whatever happens to process or machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(content)
            to_disk(file)
        rename_durably(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def to_disk(file: IO[Any]) -> None:
    """Have the disk know what was written."""
    file.flush()
    os.fsync(file.fileno())


def rename_durably(source: Path, target: Path) -> None:
    """Rename within a folder, and have the disk know before going on."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _replace(folder: Path, temporary: Path) -> None:
    """Rename `temporary` to `folder`; what stood there is kept until its successor is in place."""
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(aside / folder.name)
    try:
        temporary.rename(folder)
    except OSError:
        (aside / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
