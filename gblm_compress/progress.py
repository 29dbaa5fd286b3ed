"""Progress on stderr: a bar with ETA on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from gblm_compress.printing import PlainConsole, printable

T = TypeVar("T")
PLAIN_LINE_EVERY_S = 10.0


class Progress:
    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = PlainConsole(stderr=True, quiet=quiet)

    def say(self, message: str) -> None:
        self.console.say(message)

    def track(self, items: Sequence[T], what: str, unit: str, tokens: int = 0) -> Iterator[T]:
        """Yield `items`, and show their progress, the memory, and the rate of `tokens` (the total)."""
        with self.counter(what, unit, len(items), tokens) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def counter(self, what: str, unit: str, total: int, tokens: int = 0) -> Iterator[Callable[[], None]]:
        if self.quiet:
            yield lambda: None
            return
        import psutil

        process, start = psutil.Process(), time.monotonic()
        name, done, last = printable(what), 0, start

        def facts() -> str:
            nonlocal done
            done += 1
            speed = f"{tokens * done / total / (time.monotonic() - start):,.0f} tokens/s, " if tokens else ""
            return f"{speed}{process.memory_info().rss / 1e9:.1f} GB"

        def print_line() -> None:
            nonlocal last
            words, now = facts(), time.monotonic()
            if now - last >= PLAIN_LINE_EVERY_S and done < total:
                last, eta = now, (now - start) / done * (total - done)
                print(f"{name}: {done}/{total} {unit}, ETA {eta:.0f} s, {words}", file=sys.stderr, flush=True)

        if not self.console.is_terminal:
            yield print_line
            return
        counted = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        timed = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
        with RichProgress(*counted, *timed, console=self.console) as bar:
            task = bar.add_task(name, total=total, facts="")
            yield lambda: bar.update(task, advance=1, facts=facts())
