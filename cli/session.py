"""What every command begins and ends with: a sign of life, the models that it was given, its result in print."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gblm_compress import __version__
from gblm_compress.cli import layout
from gblm_compress.machine.environment import share_cores
from gblm_compress.printing import PlainConsole
from gblm_compress.progress import Progress
from gblm_compress.storage import records
from gblm_compress.storage.paths import kind_of, local

WIDTH_OF_FILES = 160  # columns, where the output is no terminal and has no width of its own


def progress(quiet: bool) -> Progress:
    """What tells the person who waits; the libraries keep quiet from here on."""
    begun = started(quiet)

    from gblm_compress.models.finding import silence_libraries

    share_cores()
    silence_libraries()
    return begun


def started(quiet: bool) -> Progress:
    """A sign of life before the seconds that torch and transformers take to load."""
    begun = Progress(quiet)
    begun.say(f"gblm-compress {__version__} starts …")
    return begun


def start(*models: str, quiet: bool, datasets: Sequence[str] = (), include: str | None = None) -> tuple[Any, ...]:
    """The progress, and the local folder of every model. What a name says of this machine is checked first, all of it:
    that is before a download, and before the seconds that torch and transformers take to load. A model that is a folder
    here has a task, which tells later what data it reads.
    """
    from gblm_compress import faults, tasks
    from gblm_compress.measure.zero_shot import check_folder
    from gblm_compress.models.finding import TINY, find_here, resolve_model, silence_libraries

    read = datasets if any(kind_of(local(name)) != "folder" for name in models) else ()
    named = [name for name in models if name != TINY]  # which is built where it is missing
    looks: list[Callable[[], object]] = [partial(find_here, name) for name in named]
    looks += [*(partial(tasks.data_files, name) for name in read), partial(check_folder, include)]
    faults.raise_all(faults.collect(looks))
    begun = started(quiet)
    sources = [resolve_model(name, begun) for name in models]
    share_cores()
    silence_libraries()
    return begun, *sources


def show(content: Any, summary: Any, as_json: bool) -> None:
    """Print a result: one JSON document, or a summary for people."""
    if as_json:
        print(records.as_json(content if isinstance(content, dict) else content.as_dict()), end="")
        return
    console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=WIDTH_OF_FILES)
    parts = summary(content)
    for part in parts if isinstance(parts, list) else [parts]:
        layout.show(part, console)
