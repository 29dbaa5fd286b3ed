"""`python -m tests.fuzz.processes --kills 100 --pairs 50`: commands that are killed, and two that write to one place.

Exit code 1 if bytes are lost or mixed, something is left, or a command ends in a traceback.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.forks import LONG_ENOUGH, Outcome
from tests.fuzz.__main__ import FORESEEN, Runner, contents, runner
from tests.fuzz.kinds import EXPORT, PRUNE, SHORT, words

RESUMES, REPLACES = ("--resume", "--force"), ("--force",)
# The folder that is copied from the store, the command, and what lets it go on after a kill, and replace what it wrote.
COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "prune": ("dense", PRUNE, RESUMES),
    "prune int8": ("dense", f"{PRUNE} --quantise int8", RESUMES),
    "recover": ("pruned", f"recover pruned -o out --tokens 2000 --teacher dense --data text.txt {SHORT}", RESUMES),
    "bitmask": ("pruned", f"{EXPORT} bitmask", REPLACES),
    "onnx": ("pruned", f"{EXPORT} onnx --kernels", REPLACES),
    "run": ("dense", "run small.yaml -o out --junit out.xml --summary out.md", ()),
    "report": ("ran", "report ran -o out.html", ()),
    "heat map": ("pruned", "inspect pruned --heat-map out.png", REPLACES),
}
TIMED = (".md", ".json", ".xml", ".html")
"""Records and reports: they hold the time of the work, so that two runs may differ in them."""


class Trials:
    """What a command writes when nothing disturbs it, and trials in which something does."""

    def __init__(self, fuzz: Runner, name: str) -> None:
        self.server, self.name = fuzz.server, name
        made, command, self.again = COMMANDS[name]
        self.made, self.command = fuzz.store / made, words(command, made)
        with self._folder() as place:
            outcome = self._run(place)
            assert outcome.code == 0, f"{self.name}: {outcome.stderr[-2000:]}"
            self.seconds, self.expected = outcome.seconds, _unlocked(place)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder with a copy of the command's folder, `work`; it goes at the end."""
        with tempfile.TemporaryDirectory(prefix="gblm-processes-") as place:
            shutil.copytree(self.made, Path(place) / "work", symlinks=True)
            yield Path(place)

    def _run(self, place: Path, *more: str, cache: str = "cache", seconds: float = LONG_ENOUGH) -> Outcome:
        return self.server.run([*self.command, *more], place / "work", place / cache, seconds)

    def _faults(self, place: Path, *outcomes: Outcome, whole: bool = True) -> Iterator[str]:
        """Tracebacks, and wrong bytes in the output; if it must be `whole`, also missing files and leftovers."""
        yield from ("a traceback" for outcome in outcomes if "Traceback" in outcome.stderr)
        found = _unlocked(place)
        for path in self.expected.keys() & found.keys():
            if found[path] != self.expected[path] and not path.endswith(TIMED):
                yield f"{path} has other bytes"
        if whole or (self.name != "run" and (place / "work" / "out").exists()):
            yield from (f"{path} is missing" for path in self.expected.keys() - found.keys())
        if whole:
            yield from (f"{path} was left" for path in found.keys() - self.expected.keys())

    def killed(self, pick: random.Random) -> Iterator[str]:
        """Kill the command after a random share of its time; it must then finish, with the bytes of one undisturbed."""
        with self._folder() as place:
            killed = self._run(place, seconds=pick.uniform(0.02, 1.0) * self.seconds)
            yield from self._faults(place, whole=killed.code == 0)
            # A kill may come before there is work to go on with, and after the output was in its place.
            for more in ([], *([option] for option in self.again)):
                outcome = self._run(place, *more)
                if outcome.code == 0:
                    break
            else:
                yield f"exit code {outcome.code}: {outcome.stderr[-1000:]}"
            yield from self._faults(place, outcome)

    def paired(self, pick: random.Random) -> Iterator[str]:
        """Run the command twice at once; one must write the output, and the other be refused."""
        with self._folder() as place, ThreadPoolExecutor(2) as pool:
            first = pool.submit(self._run, place)
            time.sleep(pick.choice((0, pick.uniform(0, self.seconds))))
            second = pool.submit(self._run, place, cache="other")
            outcomes = [first.result(), second.result()]
            codes = sorted(outcome.code for outcome in outcomes)
            yield from self._faults(place, *outcomes)
            if 0 not in codes or not set(codes) <= set(FORESEEN):
                yield f"exit codes {codes}: {' | '.join(outcome.stderr[-500:] for outcome in outcomes)}"
            if codes == [0, 0] and "--force" in self.again:
                yield "both wrote"


def _unlocked(place: Path) -> dict[str, str]:
    found = contents(place / "work")
    return {path: content for path, content in found.items() if not path.endswith(".lock")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only these; all if unset")
    options = parser.parse_args()
    pick, faults = random.Random(options.seed), 0
    with runner() as fuzz:
        trials = [Trials(fuzz, name) for name in options.command or COMMANDS]
        for count, kind in ((options.kills, Trials.killed), (options.pairs, Trials.paired)):
            for number in range(count):
                trial = trials[number % len(trials)]
                for fault in kind(trial, pick):
                    faults += 1
                    print(f"{trial.name}, {kind.__name__}: {fault}")
    print(f"{options.kills} kills and {options.pairs} pairs over {len(trials)} commands: {faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
