"""Folders that appear whole or not at all, and are replaced only if they are ours.

Every folder that this program makes for a user carries `gblm_manifest.json`, which lists what was written into it. A
folder is replaced only if it carries one and holds nothing beside what is listed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gblm_compress.errors import OutputError, UsageError
from gblm_compress.storage.records import read_json

MANIFEST = "gblm_manifest.json"
FILES, KIND = "files", "kind"  # keys of the manifest: what the folder holds, and what it is


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
    with scratch_folder(folder, inside) as temporary:
        yield temporary
        _list_files(temporary)
        _open_to_umask(temporary)
        try:
            check_replaceable(folder, force)
        except UsageError as error:  # it was free when the work began
            raise OutputError(str(error)) from error
        _replace(folder, temporary)


@contextmanager
def scratch_folder(folder: Path, inside: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that is gone in the end; `remove_partial` removes one that a killed process
    left.

    Args:
        inside: as for `atomic_folder`.

    Raises:
        OutputError: the folder cannot be created or filled.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=beside(folder, "partial-"), dir=inside or folder.parent))
    except OSError as error:
        raise OutputError(f"output {str(folder)!r} cannot be written: {error.strerror}") from error
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"output {str(folder)!r} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def beside(folder: Path, what: str) -> str:
    """A name for what lies beside an output folder for a time: that of no other output, and nobody else's."""
    return f".gblm-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:16]}.{what}"


def _replaced(folder: Path) -> Path:
    """Where the predecessor of a folder is while its successor takes its place."""
    return folder.with_name(beside(folder, "replaced"))


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
    for path in (_replaced(folder), *folder.parent.glob(beside(folder, "partial-*"))):
        shutil.rmtree(path, ignore_errors=True)


def restore_predecessor(folder: Path) -> None:
    """Put back what a process had set aside that was killed before its successor was in place."""
    if _replaced(folder).is_dir() and not folder.exists():
        _replaced(folder).rename(folder)


def _list_files(folder: Path) -> None:
    path = folder / MANIFEST
    if path.exists():
        content = read_json(path) | {FILES: sorted(entry.name for entry in folder.iterdir())}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open_to_umask(folder: Path) -> None:
    """mkdtemp and safetensors create private files; give the result the permissions of ordinary ones."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
