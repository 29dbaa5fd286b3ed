"""Safe text on terminals and figures: names from outside cannot move the cursor, add lines, or act as markup."""

import io
import logging
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def printable(text: str) -> str:
    """One line, with control, format and undecodable characters escaped as `repr` does."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, with line breaks kept."""
    return "\n".join(map(printable, text.split("\n")))


class PlainConsole(Console):
    """A console that prints strings without markup; only `rich.text.Text` has colours."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False, "highlight": False})

    def say(self, sentence: str | Text) -> None:
        """Print a sentence. A terminal breaks it between words, never within a path."""
        text = sentence if isinstance(sentence, Text) else self.render_str(sentence)
        if not self.is_terminal:
            self.print(text, soft_wrap=True)
            return
        start = 0
        for line in textwrap.wrap(text.plain, self.width, break_long_words=False, break_on_hyphens=False) or [""]:
            start = text.plain.index(line, start)
            self.print(text[start : start + len(line)], soft_wrap=True)
            start += len(line)

    def show(self, part: Table | Text | str) -> None:
        """Print a table or a sentence. A table that is too wide becomes lines: a row's first cell, then the others."""
        if not isinstance(part, Table):
            self.say(part)
        elif self.measure(part, options=self.options.update(width=1000)).maximum <= self.width:
            self.print(part)
        else:
            if part.title:
                self.say(Text.assemble(part.title))
            headings = [str(column.header) for column in part.columns[1:]]
            for first, *others in zip(*(column.cells for column in part.columns), strict=True):
                self.say(Text.assemble(_text(first), style="bold"))
                cells = zip(headings, others, strict=True)
                facts = [Text.assemble(f"{name} ", _text(cell)) for name, cell in cells if cell]
                self.say(Text("  ") + Text(", ").join(facts))


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(str(cell)))


def table(headings: Iterable[str], rows: Iterable[Iterable[str | Text]], **options: Any) -> Table:
    """A table with a line below its headings; a heading that begins with > is for numbers."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **options)
    for heading in headings:
        made.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    for row in rows:
        made.add_row(*row)
    return made


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the log lines, warnings and prints of libraries from the terminal; not what they write to stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def plain_figures() -> Iterator[None]:
    """Matplotlib draws labels as they are: no formulas, no warnings about missing glyphs."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
