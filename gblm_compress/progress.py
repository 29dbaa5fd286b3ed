"""Progress on stderr: a bar with ETA on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

T = TypeVar("T")
PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """What a stage tells the person who waits. `Progress(quiet=True)` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet)

    def say(self, message: str) -> None:
        """One line, now."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def track(self, items: Sequence[T] | Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` while showing how many are done and when the rest will be."""
        if total is None:
            total = len(items)  # type: ignore[arg-type]
        with self.counter(what, unit, total) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def counter(self, what: str, unit: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar that moves by one with every call of the function it yields."""
        if self.quiet:
            yield lambda: None
        elif self.console.is_terminal:
            bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            with bar:
                task = bar.add_task(what, total=total)
                yield lambda: bar.advance(task)
        else:
            yield _plain_counter(what, unit, total)


def _plain_counter(what: str, unit: str, total: int) -> Callable[[], None]:
    start = last = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= PLAIN_LINE_EVERY_S and done < total:
            last = now
            eta = (now - start) / done * (total - done)
            print(f"{what}: {done}/{total} {unit}, ETA {eta:.0f} s", file=sys.stderr, flush=True)

    return advance
