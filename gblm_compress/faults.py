"""Faults that show before the work: every look is made, and all that is found is raised at once."""

from collections.abc import Callable, Iterable

from gblm_compress.errors import GblmError, UsageError


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
        raise kind(f"{len(different)} faults\n" + "\n".join(str(fault) for fault in different))
