"""`python -m tests.fuzz --seconds 600`: examples of every kind in turn; exit code 1 if there are faults."""

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.forks import Outcome, Server
from tests.fuzz.kinds import KINDS, Kind, build_store, example
from tests.fuzz.mutations import Draw

BATCH = 25  # examples of a kind before the next one's turn
SECONDS = 10.0  # what a command on a tiny model may take
FORESEEN = (0, 2, 3, 4, 5, 6)


class Runner:
    """Runs examples, and says what is wrong with how a command ended."""

    def __init__(self, server: Server, store: Path, seconds: float) -> None:
        self.server, self.store, self.seconds = server, store, seconds
        self.counts: Counter[str] = Counter()

    def check(self, name: str, draw: Draw) -> None:
        """Run one example of a kind.

        Raises:
            AssertionError: the command crashed, hung, ended in a traceback, left something behind or changed an input;
                with all that is needed to do it again.
        """
        kind = KINDS[name]
        with tempfile.TemporaryDirectory(prefix="gblm-fuzz-") as place:
            folder = Path(place) / "work"
            shutil.copytree(self.store / kind.made, folder, symlinks=True)
            cache = folder / "cache" if (folder / "cache").exists() else Path(place)
            done, arguments = example(kind, folder, draw)
            before = _content(folder, kind)
            outcome = self.server.run(arguments, folder, cache, self.seconds)
            self.counts[name] += 1
            faults = list(_faults(outcome)) + list(_leftovers(before, _content(folder, kind), outcome))
            assert not faults, f"{name}: {'; '.join(done)}\n{arguments}\n{faults}\n{outcome.stderr[-3000:]}"

    def examples(self, name: str, count: int, number: int) -> None:
        """Check so many examples of a kind, those of seed `number`; the AssertionError is that of the smallest."""

        @seed(number)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def check(data: st.DataObject) -> None:
            self.check(name, data.draw)

        check()


def _faults(outcome: Outcome) -> Iterator[str]:
    if outcome.code not in FORESEEN:
        yield f"exit code {outcome.code} after {outcome.seconds:.0f} s"
    if "Traceback" in outcome.stderr:
        yield "a traceback"
    if "\x1b" in outcome.stdout + outcome.stderr:
        yield "an escape sequence on the terminal"


def _leftovers(before: dict[str, str], after: dict[str, str], outcome: Outcome) -> Iterator[str]:
    """A command may only make an output, and that only if it succeeded."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before and not (outcome.code == 0 and not name.startswith(".")):
            yield f"{name} was left"
        elif name in before and before[name] != after.get(name):
            yield f"{name} was changed"


def _content(folder: Path, kind: Kind) -> dict[str, str]:
    """{path: hash of its content} of the inputs, and of new paths at the top; links and folders have no hash."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name.partition("/")[0] not in kind.changes and not name.startswith("out/"):
            is_file = path.is_file() and not path.is_symlink()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else "no file"
    return found


@contextmanager
def runner(seconds: float = SECONDS) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="gblm-fuzz-store-") as store:
        server = Server()
        build_store(Path(store), server)
        yield Runner(server, Path(store), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long to go on")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these kinds; all if unset")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="to do the same again")
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds that a command may take")
    options = parser.parse_args()
    faults, number, start = 0, options.seed, time.monotonic()
    with runner(options.limit) as run:
        while (took := time.monotonic() - start) < options.seconds:
            name = (options.kind or list(KINDS))[(number - options.seed) % len(options.kind or KINDS)]
            try:
                run.examples(name, BATCH, number)
            except Exception as fault:
                faults += 1
                print(f"seed {number}: {fault}")
            number += 1
            print(f"{took:.0f} s: {sum(run.counts.values())} inputs, {faults} faults", file=sys.stderr)
    print(*(f"{count:6} {name}" for name, count in run.counts.items()), sep="\n")
    print(f"{faults} faults, seeds up to {number - 1}")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
