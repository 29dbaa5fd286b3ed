"""`python -m tests.fuzz.processes --kills 100 --pairs 50`: commands that are killed, and two that write to one place.

Exit code 1 if bytes are lost or mixed, something is left, or a command ends in a traceback.
"""

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.forks import Outcome, Server
from tests.fuzz.__main__ import FORESEEN
from tests.fuzz.kinds import PRUNE, SHORT, build_store

TEXT = ["--teacher", "DENSE", "--data", "text.txt", *SHORT]
# The folder that is copied from the store, the command, and what lets it go on after a kill, and replace what it wrote.
COMMANDS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "prune": ("dense", [*PRUNE[:1], "dense", *PRUNE[2:]], ("--resume", "--force")),
    "prune int8": ("dense", [*PRUNE[:1], "dense", *PRUNE[2:], "--quantise", "int8"], ("--resume", "--force")),
    "recover": ("pruned", ["recover", "pruned", "-o", "out", "--tokens", "2000", *TEXT], ("--resume", "--force")),
    "bitmask": ("pruned", ["export", "pruned", "-o", "out", "--format", "bitmask"], ("--force",)),
    "onnx": ("pruned", ["export", "pruned", "-o", "out", "--format", "onnx", "--kernels"], ("--force",)),
    "generate": ("dense", ["generate", "dense", "-o", "out.txt", "--tokens", "256", *SHORT], ("--force",)),
    "run": ("dense", ["run", "small.yaml", "-o", "out", "--junit", "out.xml", "--summary", "out.md"], ()),
    "report": ("ran", ["report", "ran", "-o", "out.html"], ()),
    "heat map": ("pruned", ["inspect", "pruned", "--heat-map", "out.png"], ("--force",)),
}


class Trials:
    """What a command writes when nothing disturbs it, and trials in which something does."""

    def __init__(self, server: Server, store: Path, name: str) -> None:
        self.server, self.store, self.name = server, store, name
        self.made, command, self.again = COMMANDS[name]
        self.command = [str(store / "dense" / "dense") if word == "DENSE" else word for word in command]
        first, second = (self._undisturbed() for _ in range(2))
        # Records and reports hold the time of the work, so that two runs may differ in them.
        same = {path for path in first.keys() & second.keys() if first[path] == second[path]}
        self.expected = {path: first[path] for path in same if not path.endswith((".md", ".json", ".xml", ".html"))}
        self.names = first.keys()

    def _undisturbed(self) -> dict[str, str]:
        with self._folder() as place:
            outcome = self._run(place, 0, [])
            assert outcome.code == 0, f"{self.name}: {outcome.stderr[-2000:]}"
            self.seconds = outcome.seconds
            return contents(place / "work")

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder with a copy of the command's folder, `work`; it goes at the end."""
        with tempfile.TemporaryDirectory(prefix="gblm-processes-") as place:
            shutil.copytree(self.store / self.made, Path(place) / "work", symlinks=True)
            yield Path(place)

    def _run(self, place: Path, number: int, more: list[str], seconds: float = 120) -> Outcome:
        (place / f"cache{number}").mkdir(exist_ok=True)
        for stream in ("stdout", "stderr"):  # a command may be killed before it opens them
            (place / f"cache{number}" / stream).touch()
        return self.server.run([*self.command, *more], place / "work", place / f"cache{number}", seconds)

    def _faults(self, place: Path, whole: bool) -> Iterator[str]:
        """Wrong bytes in the output; if it must be `whole`, also missing files and leftovers."""
        found = contents(place / "work")
        yield from (
            f"{path} has other bytes" for path in self.expected.keys() & found if found[path] != self.expected[path]
        )
        if whole or (self.name != "run" and (place / "work" / "out").exists()):
            yield from (f"{path} is missing" for path in self.expected.keys() - found.keys())
        if whole:
            yield from (f"{path} was left" for path in found.keys() - self.names)

    def killed(self, pick: random.Random) -> list[str]:
        """Kill the command after a random share of its time; it must then finish, with the bytes of one undisturbed."""
        with self._folder() as place:
            after = pick.uniform(0.02, 1.0) * self.seconds
            killed = self._run(place, 0, [], after)
            faults = [f"after the kill: {fault}" for fault in self._faults(place, whole=killed.code == 0)]
            # A kill may come before there is work to go on with, and after the output was in its place.
            for more in ([], *([option] for option in self.again)):
                if (outcome := self._run(place, 0, more)).code == 0:
                    break
            if outcome.code:
                faults.append(f"exit code {outcome.code}: {outcome.stderr[-1000:]}")
            faults += list(self._faults(place, whole=True))
            return [f"{self.name}, killed after {after:.2f} s: {fault}" for fault in faults + said(outcome)]

    def paired(self, pick: random.Random) -> list[str]:
        """Run the command twice at once; one must write the output, and the other be refused."""
        with self._folder() as place, ThreadPoolExecutor(2) as pool:
            delay = pick.uniform(0, self.seconds) if pick.random() < 0.5 else 0.0
            first = pool.submit(self._run, place, 0, [])
            time.sleep(delay)
            second = pool.submit(self._run, place, 1, [])
            outcomes = [first.result(), second.result()]
            codes = sorted(outcome.code if outcome.code is not None else -1 for outcome in outcomes)
            faults = list(self._faults(place, whole=True)) + [fault for outcome in outcomes for fault in said(outcome)]
            if codes[0] != 0 or codes[1] not in FORESEEN:
                faults.append(f"exit codes {codes}: {' | '.join(outcome.stderr[-500:] for outcome in outcomes)}")
            if codes == [0, 0] and "--force" in self.again:
                faults.append("both wrote")
            return [f"{self.name}, twice with {delay:.2f} s between: {fault}" for fault in faults]


def contents(folder: Path) -> dict[str, str]:
    """{path: hash of its content} of all files, without locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def said(outcome: Outcome) -> list[str]:
    return ["a traceback"] if "Traceback" in outcome.stderr else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only these; all if unset")
    options = parser.parse_args()
    pick, faults = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="gblm-processes-store-") as store:
        server = Server()
        build_store(Path(store), server)
        trials = [Trials(server, Path(store), name) for name in options.command or COMMANDS]
        for count, kind in ((options.kills, Trials.killed), (options.pairs, Trials.paired)):
            for number in range(count):
                for fault in kind(trials[number % len(trials)], pick):
                    faults += 1
                    print(fault)
    print(f"{options.kills} kills and {options.pairs} pairs over {len(trials)} commands: {faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
