"""The cache folder of this program."""

import os
from pathlib import Path

CACHE_VARIABLE = "GBLM_COMPRESS_CACHE"


def cache_folder() -> Path:
    """The folder for converted models: $GBLM_COMPRESS_CACHE, or gblm-compress in the user's cache folder."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gblm-compress"
