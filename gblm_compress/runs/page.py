"""Reports as one web page that needs nothing beside itself: `page_files/` holds its template, style and script."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from gblm_compress.printing import printable_lines
from gblm_compress.runs import images
from gblm_compress.runs.tables import Table
from gblm_compress.runs.vega import Chart

FILES = Path(__file__).parent / "page_files"


def render(
    title: str,
    verdict: str | None,
    headline: Sequence[str],
    subtitle: str,
    charts: Sequence[Chart],
    tables: Sequence[Table],
    conditions: Mapping[str, str],
    commands: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        verdict: "PASS", "FAIL", or None where nothing was asked.
        headline: sentences.
        commands: to do it again.
    """
    template = Environment(autoescape=True, finalize=_shown, loader=FileSystemLoader(FILES)).get_template("page.html")
    return template.render(
        title=title,
        verdict=verdict,
        headline=headline,
        subtitle=subtitle,
        charts=charts,
        tables=tables,
        conditions=conditions,
        commands=commands,
        recipe=json.dumps(recipe, indent=2) if recipe else None,
        specs=_as_script({chart.name: chart.spec for chart in charts}),
        css=Markup((FILES / "page.css").read_text()),
        js=Markup((FILES / "page.js").read_text()),
        script=Markup(images.script().replace("</script", "<\\/script")) if charts else "",
    )


def _as_script(content: Any) -> Markup:
    """JSON that ends no element, whatever names are in it."""
    return Markup(json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _shown(value: Any) -> Any:
    """Text that every file can hold: names may have bytes that are no UTF-8."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable_lines(value)
