"""A short slice of `make fuzz`: mutated inputs of every kind through the real commands."""

import shutil
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import Runner, runner
from tests.fuzz.kinds import KINDS

EXAMPLES = 3  # of each kind
SECONDS = 60  # what a command may take on a machine that is busy with other tests


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Runner]:
    with runner(SECONDS) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_no_crash_no_traceback_no_hang_and_nothing_left(kind: str, fuzz: Runner) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        fuzz.check(kind, data.draw)

    examples()
    assert fuzz.counts[kind] == EXAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_spoilt_is_read(kind: str, fuzz: Runner, tmp_path) -> None:
    """Else every example would be refused for a reason of its own, and nothing would be tested."""
    made = KINDS[kind]
    if kind == "command line":
        pytest.skip("there is nothing sound of that kind")
    for number, command in enumerate(made.commands):
        folder = tmp_path / str(number)
        shutil.copytree(fuzz.store / made.made, folder)
        (tmp_path / "cache").mkdir(exist_ok=True)
        outcome = fuzz.server.run(command, folder, tmp_path / "cache", SECONDS, made.code)
        assert outcome.code == 0, outcome.stderr
