"""`python -m tests.fuzz.processes`: commands killed at any moment, and two at a time with the same output.

After a kill only whole results may be there under their names, inputs are as they were, and the same command ends with
the bytes of an undisturbed run. Of two commands with one output one succeeds, and the other either comes after it or
says who holds the output.
"""

import argparse
import hashlib
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.forks import Outcome, Server
from tests.fuzz.kinds import PRUNE, RUN, build_store

LONG_ENOUGH = 60.0  # seconds, in which every command ends if it is let


@dataclass
class Command:
    """A command on a copy of an input folder, and what an undisturbed run leaves there."""

    input: str
    arguments: list[str]
    again: list[str]
    in_one_piece: bool = True  # the output appears at once; the folder of a recipe's run grows
    expected: dict[str, str] | None = None
    seconds: float = 0.0

    def run(self, server: Server, place: Path, seconds: float = LONG_ENOUGH) -> Outcome:
        shutil.rmtree(place / "work", ignore_errors=True)
        shutil.copytree(place / "store" / self.input, place / "work")
        return server.run(self.arguments, place / "work", place, seconds)

    def measure(self, server: Server, place: Path) -> None:
        for _ in range(2):  # the caches are warm the second time
            outcome = self.run(server, place)
            assert outcome.code == 0, outcome.stderr
        self.expected, self.seconds = _content(place / "work"), outcome.seconds

    def check(self, folder: Path, whole: bool) -> None:
        """Inputs are as they were; an output is there in full or not at all; at the end nothing else is there."""
        found = _content(folder)
        inputs = {name: content for name, content in self.expected.items() if not name.startswith("out/")}
        assert inputs.items() <= found.items(), "an input was changed"
        if whole:
            assert found == self.expected, sorted(found.items() ^ self.expected.items())
        elif self.in_one_piece and (folder / "out").exists():
            assert self.expected.items() <= found.items(), "an output is there and not whole"


COMMANDS = {
    "prune": Command(
        "dense",
        ["prune", "dense", "-o", "out", *PRUNE[4:], "--method", "gblm"],
        ["--resume", "--force"],
    ),
    "export": Command(
        "pruned", ["export", "pruned", "-o", "out", "--format", "bitmask", "--json", "--quiet"], ["--force"]
    ),
    "run": Command("dense", [*RUN[:2], "-o", "out", *RUN[4:]], [], in_one_piece=False),
}


def main(kills: int, pairs: int, seed: int) -> int:
    """Kill commands, start pairs of them, and report every lost, mixed or left byte; how many faults there were."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="gblm-fuzz-") as folder, Server() as one, Server() as other:
        place = Path(folder)
        build_store(place / "store", one)
        for command in COMMANDS.values():
            command.measure(one, place)
        seen: Counter[str] = Counter()
        for number in range(kills + pairs):
            name = list(COMMANDS)[number % len(COMMANDS)]
            moment = generator.uniform(0, 1.15 * COMMANDS[name].seconds)
            try:
                if number < kills:
                    seen[_kill(COMMANDS[name], one, place, moment)] += 1
                else:
                    seen[_pair(COMMANDS[name], (one, other), place, moment)] += 1
            except AssertionError as fault:
                seen["faults"] += 1
                print(f"FAULT of {name}, number {number}: {fault}", flush=True)
    for what, count in sorted(seen.items()):
        print(f"{count:5} {what}")
    return seen["faults"]


def _kill(command: Command, server: Server, place: Path, moment: float) -> str:
    """Kill a command at some moment, and let the same command end after it."""
    first = command.run(server, place, moment)
    command.check(place / "work", whole=False)
    end = server.run(command.arguments + command.again, place / "work", place, LONG_ENOUGH)
    assert end.code == 0, end.stderr
    command.check(place / "work", whole=True)
    return "killed before its end" if first.timed_out else "ended"


def _pair(command: Command, servers: tuple[Server, Server], place: Path, moment: float) -> str:
    """Two at once. Both may come to an end, one after the other, where a second run has nothing or all to do again."""
    folder = place / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "store" / command.input, folder)

    def run(number: int) -> Outcome:
        time.sleep(number * moment)
        (place / f"cache-{number}").mkdir(exist_ok=True)
        arguments = command.arguments + command.again
        return servers[number].run(arguments, folder, place / f"cache-{number}", LONG_ENOUGH)

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(run, range(2)))
    codes = sorted(outcome.code if outcome.code is not None else -1 for outcome in outcomes)
    stopped = [outcome.stderr for outcome in outcomes if outcome.code != 0]
    assert codes in ([0, 0], [0, 2]) and all("is being written by process" in said for said in stopped), outcomes
    command.check(folder, whole=True)
    return "pairs of which one stopped at once" if stopped else "pairs that came one after the other"


def _content(folder: Path) -> dict[str, str]:
    """{path: hash}, without what differs from run to run: seconds, and the environment in a report."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if not re.fullmatch(r"out/(report\..*|charts/.*|\.stages/.*)", name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many commands to kill")
    parser.add_argument("--pairs", type=int, default=50, help="how many pairs to start")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    sys.exit(main(**vars(parser.parse_args())) > 0)
