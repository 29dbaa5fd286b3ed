"""The program, as `gblm-compress` and as `python -m gblm_compress`. Ctrl-C ends it without a traceback.

The first Ctrl-C lets a command clean up; it may come while modules are imported. The second ends the process at once.
"""

import signal
import sys
from types import FrameType
from typing import NoReturn

from gblm_compress.errors import INTERRUPTED, is_interrupted


def main() -> None:
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have set it to be ignored
    if own:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from gblm_compress.cli import app

        app.main()
    except (KeyboardInterrupt, Exception):  # pydantic turns a Ctrl-C during imports into another error
        if not is_interrupted():
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
