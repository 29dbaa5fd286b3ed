"""The paths that users name, which never raise whatever the name, and the cache folder."""

import os
from pathlib import Path
from typing import Literal

CACHE_VARIABLE = "GBLM_COMPRESS_CACHE"


def cache_folder() -> Path:
    """$GBLM_COMPRESS_CACHE, or gblm-compress in the user's cache folder."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gblm-compress"


def local(name: str) -> Path:
    """The path of that name, with ~ for the user's home where there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~nobody/file
        return Path(name)


def kind_of(path: Path) -> Literal["file", "folder", "other"] | None:
    """What is there: None for nothing that can be looked at, "other" for a pipe, a device or a socket."""
    try:
        if path.is_file():
            return "file"
        if path.is_dir():
            return "folder"
        return "other" if path.exists() else None
    except OSError:  # a name longer than the file system takes, a folder that may not be searched
        return None
