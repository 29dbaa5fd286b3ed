"""Lay out and build the documentation's site: `python docs/site.py`. It needs mkdocs-material, and fetches nothing.

The pages keep the places that they have in the repository, so that their links to each other, to pictures, results and
programs are right on the site as they are on a forge.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source"
PARTS = ("README.md", "CHANGELOG.md", "LICENSE", "docs", "benchmarks", "recipes", "tests/kernels/one_product.c")


def main() -> None:
    """Build the site in `build/site`; a broken link or a page that the navigation lacks ends it."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for part in PARTS:
        target = SOURCE / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / part, target)
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(ROOT / "mkdocs.yml")]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
