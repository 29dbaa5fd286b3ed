"""The page in a browser: what it shows, at which widths, in light and dark, and that its console stays empty."""

from pathlib import Path

import pytest

from gblm_compress.runs import report as documents
from tests.browser import CHROMIUM, evaluate
from tests.runs.reports import report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(documents.html(report("a-name-of-an-export-that-is-rather-long")), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [400, 768, 1280])
def test_nothing_is_wider_than_the_window_and_the_verdict_and_charts_are_there(width, page: Path) -> None:
    """Wide tables scroll in their own box, which the keyboard reaches. The first screen shows the verdict."""
    script = """(() => {
      document.querySelectorAll('details').forEach(part => part.open = true);
      const beyond = [...document.querySelectorAll('body *')].filter(part => !part.closest('.scroll *, pre')
        && part.getBoundingClientRect().right > innerWidth).map(part => part.outerHTML.slice(0, 80));
      return [beyond, document.documentElement.scrollWidth <= innerWidth,
        [...document.images].filter(image => image.naturalWidth > 0 && image.alt).length,
        [...document.querySelectorAll('.scroll')].every(box => box.tabIndex === 0),
        [...document.querySelectorAll('th')].every(heading => heading.scope),
        document.documentElement.lang, document.querySelectorAll('main, header, nav').length,
        [...document.querySelectorAll('.figure')].map(tile => parseFloat(getComputedStyle(tile).fontSize) >= 28),
        document.querySelector('.headline').getBoundingClientRect().bottom < 900];
    })()"""
    found, messages = evaluate(page, script, width)
    assert found == [[], True, 7, True, True, "en", 3, [True] * 3, True] and messages == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(dark, page: Path) -> None:
    """The contrast that WCAG 2 asks of text: 4.5."""
    script = """(() => {
      const light = (element, property) => {
        const [r, g, b] = getComputedStyle(element)[property].match(/[0-9.]+/g).map(Number)
          .map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const page = light(document.body, 'backgroundColor');
      const ratio = text => (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
      const texts = [...document.querySelectorAll('p, td, th, figcaption, h1, h2, .badge')];
      return [page, Math.min(...texts.map(element => ratio(light(element, 'color')))),
        getComputedStyle(document.images[0]).filter];
    })()"""
    (light, contrast, filtered), _ = evaluate(page, script, dark=dark)
    assert (light < 0.05) == dark == (filtered != "none") and contrast >= 4.5


def test_a_heading_sorts_its_column_and_says_so(page: Path) -> None:
    script = """(() => {
      const table = [...document.querySelectorAll('section')]
        .find(s => s.querySelector('h2').textContent === 'Quality and size').querySelector('table');
      const sorted = heading => {
        const head = [...table.tHead.rows[0].cells].find(c => c.textContent.trim() === heading);
        head.querySelector('button').click();
        return [head.getAttribute('aria-sort'),
          [...table.tBodies[0].rows].map(r => r.cells[head.cellIndex].textContent)];
      };
      return [sorted('on disk'), sorted('on disk'), sorted('perplexity')];
    })()"""
    (up, down, other), _ = evaluate(page, script)
    assert up == ["ascending", ["590.0 kB", "600.0 kB", "1.0 MB", "1.0 MB"]]
    assert down == ["descending", ["1.0 MB", "1.0 MB", "600.0 kB", "590.0 kB"]]
    assert [text.split()[0] for text in other[1]] == ["20.00", "24.00", "24.00", "–"]
