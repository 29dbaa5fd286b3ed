"""Faults that show before the work: every look is made, and all that is found is raised at once."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from gblm_compress.errors import GblmError, UsageError

E = TypeVar("E", bound=GblmError)


def collect(looks: Iterable[Callable[[], object]]) -> list[GblmError]:
    """What the looks raise, in order."""
    found = []
    for look in looks:
        try:
            look()
        except GblmError as error:
            found.append(error)
    return found


def raise_all(faults: list[GblmError]) -> None:
    """Raises:
    GblmError: there are faults: a single one as it is, several different ones as one of their kind, or as a UsageError
        where they are of several kinds; the message lists them.
    """
    different = list({str(fault): fault for fault in faults}.values())
    if len(different) == 1:
        raise different[0]
    if different:
        kinds = {type(fault) for fault in different}
        kind = kinds.pop() if len(kinds) == 1 else UsageError
        raise together(kind, f"{len(different)} faults", [str(fault) for fault in different])


def together(kind: type[E], title: str, messages: list[str], shown: int | None = None) -> E:
    """One exception of several faults, whose message lists them.

    Args:
        shown: how many are listed; all if None.
    """
    more = [f"… and {len(messages) - shown} more"] if shown is not None and len(messages) > shown else []
    error = kind("\n".join([title, *messages[:shown], *more]))
    error.faults = tuple(messages)
    return error


def listed(error: GblmError) -> tuple[str, ...]:
    """The faults that an exception stands for."""
    return error.faults or (str(error),)
