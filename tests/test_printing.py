import io

import pytest
from rich.text import Text

from gblm_compress.printing import PlainConsole, printable, printable_lines, table

HOSTILE = (
    "[red]x", "[/]", "a\x1b[31mb", "a\nb: c", "\udcff", "\u202eevil", "\x00", "tab\t", ":smile:", "$x$", "\x9b2J",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_printable_is_one_line_that_says_what_was_there(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and shown.encode()
    assert shown.encode().decode("unicode_escape" if shown != text else "utf-8") == text


def test_ordinary_text_is_left_alone() -> None:
    for text in ("naïve 模型 😀 «x»", "[red]", "C:\\new", ""):
        assert printable(text) == text
    assert printable_lines("a\n\x1b\n") == "a\n\\x1b\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_shows_strings_as_they_are(text: str) -> None:
    """In lines, table cells and headings; our own colours still work."""
    for is_terminal in (False, True):
        file = io.StringIO()
        console = PlainConsole(file=file, width=200, force_terminal=is_terminal, color_system="standard")
        console.print(table([text], [[text]]))
        console.print(text, soft_wrap=True)
        shown = file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")  # headings are bold
        assert shown.count(printable(text)) == 3
        assert all(letter.isprintable() or letter == "\n" for letter in shown)
    console.print(Text("no", style="bold red"))
    assert "\x1b[1;31mno" in file.getvalue()
