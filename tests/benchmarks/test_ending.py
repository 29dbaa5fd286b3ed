"""What is wrong with the input of a benchmark script is told in one line."""

from unittest.mock import Mock

import pytest

from gblm_compress.errors import ModelError
from tests.scripts import loaded


@pytest.mark.parametrize(
    ("raises", "code", "said"),
    [
        (ModelError("no such model"), ModelError.exit_code, "error: no such model"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_one_line_and_a_code(raises, code: int, said: str, capsys) -> None:
    with loaded("ending") as ending, pytest.raises(SystemExit) as ended:
        ending.exit_after(Mock(side_effect=raises))
    assert ended.value.code == code
    assert capsys.readouterr().err == said + "\n"


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    with loaded("ending") as ending, pytest.raises(ZeroDivisionError):
        ending.exit_after(lambda: 1 / 0)
