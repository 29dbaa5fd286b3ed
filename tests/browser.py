"""A headless Chromium by its command line: what a script finds on a page, and what the page looks like.

`python -m tests.browser RUN` takes the pictures of a report's page for README.md; RUN is a folder that `run` wrote.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from gblm_compress.runs import report, run_report
from tests.scripts import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NARROWEST = 500  # pixels of a window; a narrower page is put into a frame
IMAGES = ROOT / "docs" / "images"
PICTURES = {"report.webp": (1280, 1500, False), "report-dark-narrow.webp": (500, 1500, True)}
"""{file: width and height of the window, whether it is dark}."""


def _run(*options: str, width: int, height: int, dark: bool) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme,
                   f"--user-data-dir={profile}", f"--window-size={width},{height}", "--enable-logging=stderr",
                   "--disable-background-networking", *options]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def evaluate(
    page: Path, expression: str, width: int = 1200, dark: bool = False, after: int = 0
) -> tuple[Any, list[str]]:
    """The value of an expression on a page, after so many milliseconds, and the messages of the page's console."""
    script = f"parent.document.documentElement.dataset.found = JSON.stringify({expression})"
    script = f"<script>{f'setTimeout(() => {{{script}}}, {after})' if after else script}</script></body>"
    content = page.read_text(encoding="utf-8").replace("</body>", script)
    if width < NARROWEST:
        frame = f'<iframe srcdoc="{html.escape(content)}" style="border: 0; width: {width}px; height: 900px"></iframe>'
        content = f'<meta charset="utf-8"><meta name="color-scheme" content="light dark">{frame}'
    copy = page.with_name(f"evaluated-{page.name}")
    copy.write_text(content, encoding="utf-8")
    waits = [f"--virtual-time-budget={2 * after}"] if after else []
    done = _run("--dump-dom", *waits, copy.resolve().as_uri(), width=max(width, NARROWEST), height=900, dark=dark)
    found = re.search('data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), re.findall(r"CONSOLE.*", done.stderr)


def take_pictures(run: Path) -> None:
    """Draw the page anew from the run's `report.json`, and take its pictures."""
    if CHROMIUM is None:
        raise SystemExit("Chromium is not installed; on Debian: apt install chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "report.html", Path(folder) / "report.png"
        page.write_text(report.html(run_report.read(run)), encoding="utf-8")
        for name, (width, height, dark) in PICTURES.items():
            _run(f"--screenshot={picture}", page.resolve().as_uri(), width=width, height=height, dark=dark)
            Image.open(picture).save(IMAGES / name, quality=80)
            print(f"{IMAGES / name}: {(IMAGES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]))
