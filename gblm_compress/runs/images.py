"""Charts as pictures, and the script that draws them on a page; the drawing is done by `drawing` in another process."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from gblm_compress.errors import MissingDependencyError, OutputError
from gblm_compress.runs.vega import Chart

PROGRAM = Path(__file__).with_name("drawing.py")
WIDTH = 640  # pixels, before `SCALE`
SCALE = 2.0


def write(charts: Iterable[Chart], folder: Path) -> None:
    """Write every chart as a PNG on white.

    Raises:
        MissingDependencyError: as `script`.
        OutputError: the disk does not take them.
    """
    specs = {chart.name: chart.spec for chart in charts}
    drawn = _ask({"charts": specs, "width": WIDTH, "scale": SCALE}) if specs else {}
    try:
        folder.mkdir(exist_ok=True)
        for name, picture in drawn.items():
            (folder / f"{name}.png").write_bytes(base64.b64decode(picture))
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error


@cache
def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that fetches nothing and defines `vegaEmbed`.

    Raises:
        MissingDependencyError: vl-convert does not run here.
    """
    return _ask({})["script"]


def _ask(request: dict[str, Any]) -> dict[str, str]:
    # The script's own folder is none to import from.
    command = [sys.executable, "-P", str(PROGRAM)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = lines[-1] if done.returncode > 0 and lines else f"signal {-done.returncode}"
        raise MissingDependencyError(
            f"the report's charts cannot be drawn ({said[:200]}); `pip install vl-convert-python`, and let processes "
            "reserve address space (`ulimit -v unlimited`)"
        )
    answer: dict[str, str] = json.loads(done.stdout)
    return answer
