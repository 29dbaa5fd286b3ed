"""The program `gblm-compress`: runs a command and turns every foreseeable failure into one message and an exit code."""

import sys
from typing import Any, NoReturn

import typer

from gblm_compress.cli import commands
from gblm_compress.errors import GblmError, UsageError

# Typer carries a click of its own or uses the installed one, depending on its version; its exceptions' base tells.
ClickException: Any = typer.BadParameter.__mro__[2]

INTERRUPTED = 130
EPILOG = """\
Exit codes: 0 success, 1 unexpected error, 2 usage or recipe error, 3 unusable model or data, 4 missing hardware or
package, 5 verification failed, 6 gate failed, 130 interrupted.
"""

app = typer.Typer(
    name="gblm-compress",
    help="Prune Hugging Face language models, export them, and measure what it really buys.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
for command in commands.COMMANDS:
    app.command(no_args_is_help=command not in (commands.doctor, commands.schema))(command)
app.callback()(commands.program)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the program and exit with its code."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        code: Any = typer.main.get_command(app).main(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # how newer versions of Typer report Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except GblmError as error:
        return _fail(error)
    except ClickException as error:
        error.show()
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print(
            "interrupted; no half-written output is left: run the same command again (prune: with --resume, to go on "
            "from what is finished)",
            file=sys.stderr,
        )
        return INTERRUPTED


def _fail(error: GblmError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
