"""The site: every link leads somewhere, every page is in the navigation, and none asks another server for anything."""

import re
import shutil
from pathlib import Path

from tests.browser import CHROMIUM, evaluate
from tests.scripts import ROOT, python


def assert_search_finds(page: Path, word: str) -> None:
    types = f"""<script>setTimeout(() => {{
        const input = document.querySelector(".md-search__input");
        document.querySelector("#__search").click();
        input.focus();
        input.value = "{word}";
        input.dispatchEvent(new KeyboardEvent("keyup", {{bubbles: true}}));
    }}, 2000)</script></body>"""
    page.write_text(page.read_text().replace("</body>", types))
    links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    found, messages = evaluate(page, links, after=10_000)
    assert any("/docs/export-pytorch.html?h=" in link for link in found), messages


def test_the_site_is_built_fetches_nothing_and_has_no_broken_link(tmp_path: Path) -> None:
    leave = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", "*.so", ".*_cache")
    for part in ("docs", "benchmarks", "recipes"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=leave)
    for part in ("README.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml", "tests/kernels/one_product.c"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / part, tmp_path / part)
    python("docs/site.py", folder=tmp_path)
    pages = list((tmp_path / "build" / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not re.findall(r'(?:src="|<link[^>]* href=")https?:[^"]*', page.read_text()), page
    if CHROMIUM:
        assert_search_finds(tmp_path / "build" / "site" / "docs" / "prune.html", "semi-structured")
    with (tmp_path / "docs" / "prune.md").open("a") as page:
        page.write("\n[gone](gone.md), [also gone](report.md#nowhere)\n")
    done = python("docs/site.py", folder=tmp_path, code=1)
    assert "'gone.md'" in done.stderr and "'#nowhere'" in done.stderr
