"""The errors that a user can meet. A message names the fault, the value given, the value needed and the next step."""

import errno
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_ALLOCATION = re.compile(
    r"can(?:'t|not) allocate memory|(?:failed|unable) to allocate|bad[ _]alloc|not enough memory|failed to map segment"
    r"|out of memory|alloc_failed|MemoryError",
    re.IGNORECASE,
)


class GblmError(Exception):
    """Base class. `faults` lists the faults if there are several. The command line prints `result` first."""

    exit_code = 1  # unexpected
    faults: tuple[str, ...] = ()
    parts: "tuple[GblmError, ...]" = ()
    result: Any = None


INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
E = TypeVar("E", bound=GblmError)


class RankError(GblmError):
    """Another process of the run ended or did not answer."""


class UsageError(GblmError):
    exit_code = 2  # an option, an argument or an output path is wrong


class RecipeError(UsageError):
    """A recipe has faults; the message lists all with their location."""


class OutputError(UsageError):
    """The output cannot be written."""


class InputError(GblmError):
    exit_code = 3  # the model or the data cannot be used


class ModelError(InputError):
    """Missing, corrupt, of an unsupported kind, or with values that cannot be pruned."""


class DataError(InputError):
    """Missing, unreadable or too short."""


class MissingDependencyError(GblmError):
    exit_code = 4  # hardware or a package is missing


class NotEnoughMemoryError(MissingDependencyError):
    """Memory ran out, of the machine or of its GPU."""


class VerificationError(GblmError):
    exit_code = 5  # a written artefact does not match its claims


class GateError(GblmError):
    exit_code = 6  # a gate of the recipe failed


def first_line(error: BaseException) -> str:
    """The first line of a message, at most 300 characters; the error's type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def is_interrupted() -> bool:
    """Whether Ctrl-C was pressed, if the program `gblm-compress` handles it."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: in Python, torch, ONNX Runtime or the loader of libraries, or in the error's cause."""
    if error is None:
        return False
    says = isinstance(error, RuntimeError | ImportError) or type(error).__module__.startswith("onnxruntime")
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (says and _ALLOCATION.search(str(error)) is not None)
        or is_out_of_memory(error.__cause__)
    )


@contextmanager
def translated(into: Callable[[str], GblmError]) -> Iterator[None]:
    """Turn a library's error into ours: `into` takes its first line. Our own errors and a lack of memory pass."""
    try:
        yield
    except Exception as error:  # libraries raise many kinds for damaged files
        if isinstance(error, GblmError) or is_out_of_memory(error):
            raise
        raise into(first_line(error)) from error


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put the name of a model or a layer before the message of an error of ours."""
    try:
        yield
    except GblmError as error:
        raise type(error)(f"{prefix}{error}") from error


def collect(looks: Iterable[Callable[[], object]]) -> list[GblmError]:
    """The errors that these functions raise, in order; an error of `raise_all` counts as its parts."""
    found: list[GblmError] = []
    for look in looks:
        try:
            look()
        except GblmError as error:
            found += error.parts or (error,)
    return found


def raise_all(faults: list[GblmError]) -> None:
    """Raise the faults, if any: one as it is, several as one error (a UsageError if their kinds differ)."""
    different = list({str(fault): fault for fault in faults}.values())
    if len(different) == 1:
        raise different[0]
    if different:
        kinds = {type(fault) for fault in different}
        kind = kinds.pop() if len(kinds) == 1 else UsageError
        several = together(kind, f"{len(different)} faults", [str(fault) for fault in different])
        several.parts = tuple(different)
        raise several


def together(kind: type[E], title: str, messages: list[str]) -> E:
    """One error whose message lists several faults."""
    error = kind("\n".join([title, *messages]))
    error.faults = tuple(messages)
    return error
