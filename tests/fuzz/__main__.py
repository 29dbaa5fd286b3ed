"""`python -m tests.fuzz --seconds 600`: examples of every kind in turn; exit code 1 if there are faults."""

import random
import sys
import time
from typing import Annotated

import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import SECONDS, Runner, runner

BATCH = 25  # examples of a kind before the next one's turn


def main(
    seconds: Annotated[float, typer.Option(help="How long to go on.")] = 600,
    kind: Annotated[list[str] | None, typer.Option(help="Only these kinds; all if unset.")] = None,
    random_seed: Annotated[int | None, typer.Option("--seed", help="To do the same again; drawn if unset.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that a command may take.")] = SECONDS,
) -> None:
    """Mutate inputs of every kind, run the real commands on them, and report what they should not have done."""
    number = random_seed if random_seed is not None else random.randrange(2**32)
    faults: list[str] = []
    with runner(limit) as run:
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            for name in kind or KINDS:
                found = _batch(run, name, number)
                faults += found
                number += 1
                took = time.monotonic() - start
                print(
                    f"{took:.0f} s: {sum(run.counts.values())} inputs, {len(faults)} faults",
                    *found,
                    sep="\n",
                    file=sys.stderr,
                )
                if took > seconds:
                    break
    table = Table("kind", "inputs")
    for name, count in run.counts.items():
        table.add_row(name, str(count))
    table.add_row("all", str(sum(run.counts.values())))
    Console().print(table)
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults, seeds up to {number - 1}")
    raise typer.Exit(bool(faults))


def _batch(run: Runner, name: str, number: int) -> list[str]:
    """Some examples of one kind; the smallest that is at fault, if any is."""

    @seed(number)
    @settings(
        max_examples=BATCH, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        run.check(name, data.draw)

    try:
        examples()
    except Exception as fault:
        return [f"seed {number}: {fault}"]
    return []


if __name__ == "__main__":
    typer.run(main)
