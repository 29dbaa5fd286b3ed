"""What is wrong with the input of a benchmark script is told in one line."""

from unittest.mock import Mock

import pytest

from gblm_compress.errors import ModelError
from tests.scripts import loaded


def test_one_line_and_a_code_and_what_nobody_foresaw_as_it_is(capsys) -> None:
    with loaded("ending") as ending:
        for raised, code, said in (
            (ModelError("no such"), 3, "error: no such\n"),
            (KeyboardInterrupt(), 130, "interrupted\n"),
        ):
            with pytest.raises(SystemExit) as ended:
                ending.exit_after(Mock(side_effect=raised))
            assert (ended.value.code, capsys.readouterr().err) == (code, said)
        with pytest.raises(ZeroDivisionError):
            ending.exit_after(lambda: 1 / 0)
