"""Runs examples and says what is wrong with how a command ended."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.forks import Outcome, Server
from tests.fuzz.kinds import KINDS, Kind, build_store, example
from tests.fuzz.mutations import Draw

SECONDS = 10.0
"""What a command on a tiny model may take."""

FORESEEN = (0, 2, 3, 4, 5, 6)


@dataclass
class Runner:
    """The server, the unspoilt folders, and how many examples of each kind were run."""

    server: Server
    store: Path
    seconds: float = SECONDS
    counts: dict[str, int] = field(default_factory=dict)

    def check(self, name: str, draw: Draw) -> None:
        """Run one example of a kind.

        Raises:
            AssertionError: the command crashed, hung, ended in a traceback, left something behind or changed an input;
                with all that is needed to do it again.
        """
        kind = KINDS[name]
        with tempfile.TemporaryDirectory(prefix="gblm-fuzz-") as place:
            folder, cache = Path(place) / "work", Path(place) / "cache"
            shutil.copytree(self.store / kind.made, folder, symlinks=True)
            cache.mkdir()
            done, arguments = example(kind, folder, draw)
            before = _content(folder, kind)
            own_cache = folder / "cache"
            outcome = self.server.run(arguments, folder, own_cache if own_cache.exists() else cache, self.seconds)
            self.counts[name] = self.counts.get(name, 0) + 1
            faults = list(_faults(outcome)) + list(_leftovers(before, _content(folder, kind), outcome))
            assert not faults, f"{name}: {'; '.join(done)}\n{arguments}\n{faults}\n{outcome.stderr[-3000:]}"


def _faults(outcome: Outcome) -> Iterator[str]:
    if outcome.timed_out:
        yield f"no end within {outcome.seconds:.0f} s"
    elif outcome.signal:
        yield f"ended by signal {outcome.signal}"
    elif outcome.code not in FORESEEN:
        yield f"exit code {outcome.code}"
    if "Traceback" in outcome.stderr:
        yield "a traceback"
    if "\x1b" in outcome.stdout + outcome.stderr:
        yield "an escape sequence on the terminal"


def _leftovers(before: dict[str, str], after: dict[str, str], outcome: Outcome) -> Iterator[str]:
    """What a command may do to its folder: nothing but make an output, and that only if it succeeded."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before and not (outcome.code == 0 and not name.startswith(".")):
            yield f"{name} was left"
        elif name in before and before[name] != after.get(name):
            yield f"{name} was changed"


def _content(folder: Path, kind: Kind) -> dict[str, str]:
    """{path: a hash of what is there} of the inputs, and the names alone of what is new at the top."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if parts[0] in kind.changes or (parts[0] == "out" and len(parts) > 1):
            continue
        regular = path.is_file() and not path.is_symlink()
        found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest() if regular else "no file"
    return found


@contextmanager
def runner(seconds: float = SECONDS) -> Iterator[Runner]:
    """A runner with folders of its own, which go at the end."""
    with tempfile.TemporaryDirectory(prefix="gblm-fuzz-store-") as store, Server() as server:
        build_store(Path(store), server)
        yield Runner(server, Path(store), seconds)
