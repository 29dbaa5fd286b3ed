"""A short slice of `make fuzz`: mutated inputs of every kind through the real commands."""

import shutil
from collections.abc import Iterator

import pytest

from tests.fuzz.__main__ import Runner, runner
from tests.fuzz.kinds import KINDS, words

EXAMPLES = 3  # of each kind
SECONDS = 60  # what a command may take on a machine that is busy with other tests
SOUND = {(kind.made, kind.model, command) for kind in KINDS.values() if kind.files for command in kind.commands}


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Runner]:
    with runner(SECONDS) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_no_crash_no_traceback_no_hang_and_nothing_left(kind: str, fuzz: Runner) -> None:
    fuzz.examples(kind, EXAMPLES, 0)
    assert fuzz.counts[kind] == EXAMPLES


@pytest.mark.parametrize(("made", "model", "command"), sorted(SOUND))
def test_what_is_not_spoilt_is_read(made: str, model: str, command: str, fuzz: Runner, tmp_path) -> None:
    """Else every example would be refused for a reason of its own, and nothing would be tested."""
    shutil.copytree(fuzz.store / made, tmp_path / "work")
    outcome = fuzz.server.run(words(command, model), tmp_path / "work", tmp_path, SECONDS)
    assert outcome.code == 0, outcome.stderr
