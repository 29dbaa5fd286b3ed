"""Pictures of a report's page for README.md: `python -m tests.screenshots RUN`, RUN being a folder that `run` wrote."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report
from tests.browser import CHROMIUM, screenshot
from tests.scripts import ROOT

IMAGES = ROOT / "docs" / "images"
PICTURES = {"report.webp": (1280, 1500, False), "report-dark-narrow.webp": (500, 1500, True)}
"""{file: width and height of the window, whether it is dark}."""


def main(run: Path) -> None:
    """Draw the page anew from the run's `report.json`, and take its pictures."""
    if CHROMIUM is None:
        raise SystemExit("Chromium is not installed; on Debian: apt install chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "report.html", Path(folder) / "report.png"
        page.write_text(documents.html(run_report.read(run)), encoding="utf-8")
        for name, (width, height, dark) in PICTURES.items():
            screenshot(page, picture, width, height, dark)
            Image.open(picture).save(IMAGES / name, quality=80)
            print(f"{IMAGES / name}: {(IMAGES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
