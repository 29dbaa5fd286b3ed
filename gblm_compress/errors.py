"""Every error the user can cause or meet, and the exit code each ends the program with.

    GblmError                      1  unexpected
    ├── RankError                  1  another process of the run is gone
    ├── UsageError                 2  an option, an argument or an output path is wrong
    │   ├── RecipeError            2  a recipe file has faults
    │   └── OutputError            2  the disk does not take what is to be written
    ├── InputError                 3  the model or the data cannot be used
    │   ├── ModelError             3
    │   └── DataError              3
    ├── MissingDependencyError     4  hardware or a package is missing
    │   └── NotEnoughMemoryError   4  memory ran out
    ├── VerificationError          5  an artefact is not what it claims to be
    └── GateError                  6  a gate of the recipe failed

A message says what is wrong, what was given, what was needed, and what to do next.
"""

import errno
import re
from typing import Any

_ALLOCATION = re.compile(r"can(?:'t|not) allocate memory", re.IGNORECASE)


class GblmError(Exception):
    """Root of the tree; never raised itself.

    Attributes:
        faults: each of several that one exception stands for; empty where the message is all.
        result: what a command found before it failed, which the command line prints.
    """

    exit_code = 1
    faults: tuple[str, ...] = ()
    result: Any = None


class RankError(GblmError):
    """Another process of a run over several ended or did not answer."""


class UsageError(GblmError):
    """An option, an argument or an output path is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has faults; the message lists all of them with their location."""


class OutputError(UsageError):
    """A folder or file cannot be written: the disk is full or read-only, or permissions forbid it."""


class InputError(GblmError):
    """The model or the data cannot be used."""

    exit_code = 3


class ModelError(InputError):
    """The model is missing, corrupt, of an unsupported kind, or holds values that cannot be pruned."""


class DataError(InputError):
    """The text is missing, unreadable or too short."""


class MissingDependencyError(GblmError):
    """Hardware or a package that the request needs is not there."""

    exit_code = 4


class NotEnoughMemoryError(MissingDependencyError):
    """Memory ran out, of the machine or of its GPU."""


class VerificationError(GblmError):
    """An artefact, reopened, is not what it claims to be."""

    exit_code = 5


class GateError(GblmError):
    """A gate of the recipe failed."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its type where it has no message."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, torch on a GPU and torch on a CPU each say so in their own way."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _ALLOCATION.search(str(error)) is not None)
    )
