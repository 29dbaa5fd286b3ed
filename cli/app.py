"""The program `gblm-compress`: runs a command, and ends a failure with one message and an exit code."""

import errno
import io
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from gblm_compress import __version__
from gblm_compress.api import GROUPS
from gblm_compress.cli import options
from gblm_compress.errors import (
    INTERRUPTED,
    GblmError,
    NotEnoughMemoryError,
    OutputError,
    UsageError,
    first_line,
    is_interrupted,
    is_out_of_memory,
)
from gblm_compress.machine import memory
from gblm_compress.printing import printable_lines

# Some versions of Typer carry their own click: take the base class from its exceptions.
ClickException: Any = typer.BadParameter.__mro__[2]

TRACEBACK_VARIABLE = "GBLM_COMPRESS_TRACEBACK"
EPILOG = """\
Exit codes: 0 success, 1 unexpected error, 2 usage or recipe error, 3 unusable model or data, 4 missing hardware or
package, 5 verification failed, 6 gate failed, 130 interrupted. GBLM_COMPRESS_TRACEBACK=1 shows where an unexpected
error arose.
"""

STOPPED = (
    "interrupted; no half-written output is left: run the same command again (with --resume, prune and recover "
    "continue from the finished work)"
)

app = typer.Typer(
    name="gblm-compress",
    cls=options.Group,
    help="Prune Hugging Face models, export them, and measure the gain.\n\nStart with: gblm-compress run quickstart",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": 1000},  # help is as wide as the terminal
)
for group, commands in GROUPS.items():
    for command in commands:
        options.add(app, command, group)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main(arguments: list[str] | None = None) -> NoReturn:
    # A stream may be closed before the program starts.
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may have characters that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    memory.is_own_process = True
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except Exception as error:
        code = _unforeseen(error)
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    try:
        code: Any = typer.main.get_command(app).main(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # how newer versions of Typer report Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except GblmError as error:
        if is_interrupted() or (is_out_of_memory(error) and not isinstance(error, NotEnoughMemoryError)):
            raise
        _print(f"error: {error}")
        return error.exit_code
    except ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        _print(shown.getvalue().rstrip())
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _print(STOPPED)
        return INTERRUPTED


def _unforeseen(error: Exception) -> int:
    if is_interrupted():  # libraries turn Ctrl-C into errors of their own
        _print(STOPPED)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GblmError.exit_code
    with_traceback = bool(os.environ.get(TRACEBACK_VARIABLE))
    if with_traceback:
        _print("".join(traceback.format_exception(error)))
    message, code = _in_words(error)
    _print(f"error: {message}" + ("" if with_traceback else f"\n{TRACEBACK_VARIABLE}=1 shows where it arose"))
    return code


def _in_words(error: Exception) -> tuple[str, int]:
    said = first_line(error)
    if is_out_of_memory(error):
        advice = "give smaller batches, fewer --samples or a shorter --sequence-length; prune has --memory"
        return f"memory ran out ({said}); {advice}", NotEnoughMemoryError.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({said}); make room, and run the same command again", OutputError.exit_code
    if isinstance(error, OSError):
        return f"the system reports an error ({said})", GblmError.exit_code
    if isinstance(error, RecursionError):
        return f"an input is nested too deeply ({said})", GblmError.exit_code
    return f"a fault of this program; please report it ({type(error).__name__}: {said})", GblmError.exit_code


def _print(message: str) -> None:
    print(printable_lines(message), file=sys.stderr)
