"""`python -m tests.fuzz.processes`: commands killed at any moment, and two at a time with the same output.

After a kill only whole results may be there under their names, inputs are as they were, and the same command ends with
the bytes of a run that nobody disturbed. Of two commands with one output one succeeds, and the other either comes
after it or says who holds the output.
"""

import hashlib
import random
import re
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tests.forks import Outcome, Server
from tests.fuzz.kinds import PRUNE, RUN, build_store

COMMANDS = {
    "prune": ["prune", "dense", "-o", "out", *PRUNE[4:], "--method", "gblm", "--no-offload"],
    "export": ["export", "pruned", "-o", "out", "--format", "bitmask", "--json", "--quiet"],
    "run": [*RUN[:2], "-o", "out", *RUN[4:]],
}
INPUT = {"prune": "dense", "export": "pruned", "run": "dense"}
AGAIN = {"prune": ["--resume", "--force"], "export": ["--force"], "run": []}
LONG_ENOUGH = 60.0  # seconds, in which every command ends if it is let


def main(
    kills: Annotated[int, typer.Option(help="How many commands to kill.")] = 100,
    pairs: Annotated[int, typer.Option(help="How many pairs to start.")] = 50,
    seed: Annotated[int, typer.Option(help="Random seed for the moments.")] = 0,
) -> None:
    """Kill commands, start pairs of them, and report every lost, mixed or left byte."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="gblm-fuzz-") as place, Server() as one, Server() as other:
        store = Path(place) / "store"
        build_store(store, one)
        expected = {name: _expected(one, store, Path(place) / f"expected-{name}", name) for name in COMMANDS}
        seen: Counter[str] = Counter()
        faults = 0
        for number in range(kills + pairs):
            name = list(COMMANDS)[number % len(COMMANDS)]
            try:
                if number < kills:
                    killed = _kill(one, store, Path(place), name, expected, generator)
                    seen["killed before its end" if killed else "ended"] += 1
                else:
                    seen[_pair(one, other, store, Path(place), name, expected, generator)] += 1
            except AssertionError as fault:
                faults += 1
                print(f"FAULT of {name}, number {number}: {fault}", flush=True)
                shutil.rmtree(Path(place) / "work", ignore_errors=True)  # as the next one finds it after a success
    for what, count in sorted(seen.items()):
        print(f"{count:5} {what}")
    if faults:
        print(f"{faults:5} faults")
        raise typer.Exit(1)


def _expected(server: Server, store: Path, folder: Path, name: str) -> tuple[dict[str, str], float]:
    """What an undisturbed command leaves, and how long it takes."""
    outcome = _run(server, store, folder, name, LONG_ENOUGH)
    assert outcome.code == 0, outcome.stderr
    outcome = _run(server, store, folder, name, LONG_ENOUGH)  # the caches are warm now
    content = _content(folder)
    shutil.rmtree(folder)
    return content, outcome.seconds


def _kill(server: Server, store: Path, place: Path, name: str, expected: dict, generator: random.Random) -> bool:
    """Kill a command at some moment, let the same command end after it, and say whether it was killed at all."""
    content, seconds = expected[name]
    folder = place / "work"
    first = _run(server, store, folder, name, generator.uniform(0, 1.1 * seconds))
    _check(folder, content, whole=False, in_one_piece=name != "run")
    end = server.run(COMMANDS[name] + AGAIN[name], folder, place, LONG_ENOUGH)
    assert end.code == 0, end.stderr
    _check(folder, content, whole=True)
    shutil.rmtree(folder)
    return first.timed_out


def _pair(
    one: Server, other: Server, store: Path, place: Path, name: str, expected: dict, generator: random.Random
) -> str:
    """Two at once. Both may come to an end, one after the other, where a second run has nothing or all to do again."""
    content, seconds = expected[name]
    folder, caches = place / "work", (place / "one", place / "other")
    for cache in caches:
        cache.mkdir(exist_ok=True)
    shutil.copytree(store / INPUT[name], folder)
    outcomes: dict[int, Outcome] = {}

    def run(number: int, server: Server, delay: float) -> None:
        threading.Event().wait(delay)
        outcomes[number] = server.run(COMMANDS[name] + AGAIN[name], folder, caches[number], LONG_ENOUGH)

    threads = [
        threading.Thread(target=run, args=(0, one, 0.0)),
        threading.Thread(target=run, args=(1, other, generator.uniform(0, 1.2 * seconds))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(outcome.code if outcome.code is not None else -1 for outcome in outcomes.values())
    stopped = [outcome.stderr for outcome in outcomes.values() if outcome.code != 0]
    assert codes in ([0, 0], [0, 2]) and all("is being written by process" in said for said in stopped), outcomes
    _check(folder, content, whole=True)
    shutil.rmtree(folder)
    return "pairs of which one stopped at once" if stopped else "pairs that came one after the other"


def _run(server: Server, store: Path, folder: Path, name: str, seconds: float) -> Outcome:
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(store / INPUT[name], folder)
    return server.run(COMMANDS[name], folder, folder.parent, seconds)


def _check(folder: Path, expected: dict[str, str], whole: bool, in_one_piece: bool = True) -> None:
    """Inputs are as they were; an output is there in full or not at all; at the end nothing else is there.

    Args:
        in_one_piece: whether the output appears at once; the folder of a recipe's run grows.
    """
    found = _content(folder)
    inputs = {name: content for name, content in expected.items() if not name.startswith("out/")}
    assert inputs.items() <= found.items(), "an input was changed"
    if whole:
        assert found == expected, sorted(found.items() ^ expected.items())
    elif in_one_piece and (folder / "out").exists():
        assert expected.items() <= found.items(), "an output is there and not whole"


def _content(folder: Path) -> dict[str, str]:
    """{path: hash}, without what differs from run to run: seconds, and the environment in a report."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if not re.fullmatch(r"out/(report\..*|charts/.*|\.stages/.*)", name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    typer.run(main)
