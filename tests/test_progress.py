import io

import pytest

from gblm_compress import progress as module
from gblm_compress.printing import PlainConsole
from gblm_compress.progress import Progress

NAME = "[red]m[/x]\x1b[2J\nb"
SHOWN = "[red]m[/x]\\x1b[2J\\nb"


def test_say_shows_names_as_they_are(capsys) -> None:
    Progress().say(f"loading {NAME} …")
    assert capsys.readouterr().err == f"loading {SHOWN} …\n"
    Progress(quiet=True).say("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_show_names_as_they_are(is_terminal: bool, capsys, monkeypatch) -> None:
    monkeypatch.setattr(module, "PLAIN_LINE_EVERY_S", 0)
    progress, file = Progress(), io.StringIO()
    if is_terminal:
        progress.console = PlainConsole(file=file, force_terminal=True, width=200)
    assert list(progress.track([1, 2], NAME, unit="blocks")) == [1, 2]
    assert SHOWN in (file.getvalue() if is_terminal else capsys.readouterr().err)
    assert "\x1b[2J" not in file.getvalue()
