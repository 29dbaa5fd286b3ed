"""Charts as pictures and as a script: the only module that knows vl-convert, which carries Vega-Lite."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from gblm_compress.errors import OutputError
from gblm_compress.runs.charts import Chart

WIDTH = 640  # pixels, before `SCALE`
SCALE = 2.0


def write(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Write every chart as a PNG on white.

    Raises:
        OutputError: the disk does not take it.
    """
    import vl_convert

    written = []
    try:
        folder.mkdir(exist_ok=True)
        for chart in charts:
            path = folder / f"{chart.name}.png"
            path.write_bytes(vl_convert.vegalite_to_png(chart.spec | {"width": WIDTH}, scale=SCALE))
            written.append(path)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error
    return written


@cache
def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that fetches nothing and defines `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle()
