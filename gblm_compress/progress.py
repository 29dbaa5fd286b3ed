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
    """What a stage tells the person who waits. `Progress(quiet=True)` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = PlainConsole(stderr=True, quiet=quiet)

    def say(self, message: str) -> None:
        """One line, now."""
        self.console.say(message)

    def track(self, items: Sequence[T], what: str, unit: str, tokens: int = 0) -> Iterator[T]:
        """Yield `items` while showing how many are done, when the rest will be, and the memory of the process.

        Args:
            tokens: of text that go through all items together; their rate is shown.
        """
        with self.counter(what, unit, len(items), tokens) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def counter(self, what: str, unit: str, total: int, tokens: int = 0) -> Iterator[Callable[[], None]]:
        """A bar that moves by one with every call of the function it yields."""
        if self.quiet:
            yield lambda: None
        elif self.console.is_terminal:
            bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
            )
            facts = _Facts(total, tokens)
            with bar:
                task = bar.add_task(printable(what), total=total, facts="")
                yield lambda: bar.update(task, advance=1, facts=facts.after_one_more())
        else:
            yield _plain_counter(printable(what), unit, total, tokens)


class _Facts:
    """Tokens per second and memory, in words."""

    def __init__(self, total: int, tokens: int) -> None:
        self._start, self._done, self._total, self._tokens = time.monotonic(), 0, total, tokens
        import psutil

        self._process = psutil.Process()

    def after_one_more(self) -> str:
        self._done += 1
        memory = f"{self._process.memory_info().rss / 1e9:.1f} GB"
        if not self._tokens:
            return memory
        rate = self._tokens * self._done / self._total / (time.monotonic() - self._start)
        return f"{rate:,.0f} tokens/s, {memory}"


def _plain_counter(what: str, unit: str, total: int, tokens: int) -> Callable[[], None]:
    start = last = time.monotonic()
    done = 0
    facts = _Facts(total, tokens)

    def advance() -> None:
        nonlocal done, last
        done += 1
        now, words = time.monotonic(), facts.after_one_more()
        if now - last >= PLAIN_LINE_EVERY_S and done < total:
            last = now
            eta = (now - start) / done * (total - done)
            print(f"{what}: {done}/{total} {unit}, ETA {eta:.0f} s, {words}", file=sys.stderr, flush=True)

    return advance
