"""Pictures of a report's page for README.md: `python -m tests.screenshots RUN`, RUN being a folder that `run` wrote."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report
from tests.browser import CHROMIUM, opened

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PICTURES = {"report.webp": (1280, 1500, False), "report-dark-narrow.webp": (500, 1500, True)}
"""{file: width and height of the window, whether it is dark}."""


def main(run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `run` wrote.")]) -> None:
    """Draw the page anew from the run's `report.json`, and take its pictures."""
    if CHROMIUM is None:
        raise SystemExit("Chromium is not installed; on Debian: apt install chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, opened(Path(folder) / "profile") as page:
        path = Path(folder) / "report.html"
        path.write_text(documents.html(run_report.read(run)), encoding="utf-8")
        for name, (width, height, dark) in PICTURES.items():
            page.open(path, width, dark=dark, height=height)
            page.screenshot(IMAGES / name)
            print(f"{IMAGES / name}: {(IMAGES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
