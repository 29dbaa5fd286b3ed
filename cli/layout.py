"""How results fit a terminal: tables narrower than it, or stacked, and sentences that break between words."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from gblm_compress.printing import PlainConsole, printable

if TYPE_CHECKING:
    from gblm_compress.runs.tables import Table as Content

COLOURS = {"good": "green", "bad": "bold red", "": ""}


def plain(*headings: str, **options: Any) -> Table:
    """An empty table with a line below its headings and no others, as all tables of this program are."""
    return Table(*headings, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **options)


def titled(content: "Content") -> list[Any]:
    """A table of a report under its title, with its notes."""
    table = plain(title=Text(content.title, style="bold"), title_justify="left")
    for heading, number in content.columns.items():
        table.add_column(heading, justify="right" if number else "left")
    for row in content.rows:
        table.add_row(*(Text(printable(cell.text), style=COLOURS[cell.mark]) for cell in row))
    return [table, *content.all_notes]


def show(part: Any, console: PlainConsole) -> None:
    """Print a table or a sentence. A table that is wider than the console is stacked: a line for each row, and below
    it every other cell with its heading."""
    if isinstance(part, Table) and _width(part, console) <= console.width:
        console.print(part)
    else:
        for sentence in _stacked(part) if isinstance(part, Table) else [part]:
            console.say(sentence)


def _width(table: Table, console: PlainConsole) -> int:
    return console.measure(table, options=console.options.update(width=1000)).maximum


def _stacked(table: Table) -> list[Text]:
    lines = [Text.assemble(table.title)] if isinstance(table.title, Text) else []
    columns = [list(column.cells) for column in table.columns]
    for first, *others in zip(*columns, strict=True):
        lines.append(_styled(first, "bold"))
        facts = [
            Text.assemble(f"{column.header} ", _styled(cell))
            for column, cell in zip(table.columns[1:], others, strict=True)
            if str(cell)
        ]
        lines.append(Text("  ") + Text(", ").join(facts))
    return lines


def _styled(cell: Any, style: str = "") -> Text:
    text = cell.copy() if isinstance(cell, Text) else Text(printable(str(cell)))
    if style:
        text.stylize(style)
    return text
