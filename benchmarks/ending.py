"""How a script ends where its input is wrong or its user has enough: with one line, as the program does."""

import sys
from collections.abc import Callable

from gblm_compress.errors import GblmError

INTERRUPTED = 130


def exit_after(main: Callable[[], None]) -> None:
    """Run a script, and exit with the code of what it was told."""
    try:
        main()
    except GblmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
