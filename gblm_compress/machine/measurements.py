"""What was measured about the kernels of this machine, kept in the cache folder so that it is measured once."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from gblm_compress.errors import OutputError
from gblm_compress.storage import records
from gblm_compress.storage.paths import cache_folder

FILE = "measurements.json"  # {machine: {what: result}}
T = TypeVar("T", int, str)


def remembered(machine: str, what: str, measure: Callable[[], T], is_valid: Callable[[Any], bool]) -> T:
    """The result of `measure`, or what it was when this machine was last asked.

    Args:
        machine: hardware and versions that the result holds for.
        what: everything else that it depends on.
        is_valid: whether a value of any type, read from a file that may be damaged, can be such a result; others are
            measured again.
    """
    path = cache_folder() / FILE
    known = recorded(path, machine)
    if what not in known or not is_valid(known[what]):
        known[what] = measure()
        with suppress(OSError, OutputError):  # a cache that cannot be written makes nothing but the next start slower
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = _read(path)  # again: another process may have added to it
            stored[machine] = stored.get(machine, {}) | known
            records.write_text(path, json.dumps(stored, indent=2) + "\n")
    result: T = known[what]
    return result


@cache
def recorded(path: Path, machine: str) -> dict[str, Any]:
    return _read(path).get(machine, {})


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What the file holds as far as it has the right form; what has not is as good as not there."""
    try:
        content = records.read_json(path)
    except (OSError, ValueError):
        return {}
    return {machine: results for machine, results in content.items() if isinstance(results, dict)}
