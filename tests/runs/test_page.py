"""The page in a browser: what it shows, at which widths, in light and dark, and that nothing is fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gblm_compress.runs import history
from gblm_compress.runs import report as documents
from tests.browser import CHROMIUM, Page, opened
from tests.runs.reports import HOSTILE, report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")

CHARTS = 12  # of a report that has everything
LUMINANCE = """
(element, property) => {
  const [r, g, b] = getComputedStyle(element)[property].match(/[0-9.]+/g).map(Number)
    .map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
"""  # of WCAG 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(documents.html(report("a-name-of-an-export-that-is-rather-long")))
    (folder / "hostile.html").write_text(documents.html(report(HOSTILE)))
    (folder / "history.html").write_text(history.html([report(), report(tpot=9.0), report(tpot=14.0)]))
    return folder


@pytest.mark.parametrize("name", ["report", "hostile", "history"])
def test_charts_are_drawn_and_the_console_stays_empty(name, browser: Page, written: Path) -> None:
    browser.open(written / f"{name}.html", 1200)
    drawn = browser.evaluate("document.querySelectorAll('.chart svg').length")
    assert drawn == (CHARTS if name != "history" else 3)
    assert browser.messages == [] and browser.requests == []


@pytest.mark.parametrize("width", [500, 900, 1600])
def test_nothing_is_wider_than_the_window(width, browser: Page, written: Path) -> None:
    """Wide tables scroll in their own box, which the keyboard reaches."""
    browser.open(written / "report.html", width)
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    beyond = """[...document.querySelectorAll('body *')].filter(part => !part.closest('.scroll *, pre, svg')
        && part.getBoundingClientRect().right > innerWidth).map(part => part.outerHTML.slice(0, 80))"""
    assert browser.evaluate(beyond) == []
    boxes = "[...document.querySelectorAll('.scroll')].every(box => box.tabIndex === 0)"
    assert browser.evaluate(boxes) is True


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(dark, browser: Page, written: Path) -> None:
    """The contrast that WCAG 2 asks of text, 4.5, on the page and within its charts."""
    browser.open(written / "report.html", 1200, dark=dark)
    contrast = f"""(() => {{
      const of = {LUMINANCE}, page = of(document.body, 'backgroundColor');
      const ratio = light => (Math.max(light, page) + 0.05) / (Math.min(light, page) + 0.05);
      const texts = [...document.querySelectorAll('p, td, th, figcaption, h1, h2, .badge')].map(e => of(e, 'color'));
      const charts = [...document.querySelectorAll('.chart svg text')].map(e => of(e, 'fill'));
      return [page, Math.min(...texts.map(ratio)), Math.min(...charts.map(ratio)), charts.length];
    }})()"""
    page, text, chart, count = browser.evaluate(contrast)
    assert (page < 0.05) == dark
    assert text >= 4.5 and chart >= 4.5 and count > 50


def test_a_heading_sorts_its_column_and_says_so(browser: Page, written: Path) -> None:
    browser.open(written / "report.html", 1200)
    column = """(title, heading) => {
      const table = [...document.querySelectorAll('section')].find(s => s.querySelector('h2').textContent === title)
        .querySelector('table');
      const head = [...table.tHead.rows[0].cells].find(c => c.textContent.trim() === heading);
      return {table, head, texts: () => [...table.tBodies[0].rows].map(r => r.cells[head.cellIndex].textContent)};
    }"""
    pressed = f"""(() => {{
      const found = ({column})('Quality and size', 'on disk'), seen = [];
      for (let i = 0; i < 2; i++) {{
        found.head.querySelector('button').click();
        seen.push([found.head.getAttribute('aria-sort'), found.texts()]);
      }}
      const other = ({column})('Quality and size', 'perplexity');
      other.head.querySelector('button').click();
      seen.push([found.head.getAttribute('aria-sort'), other.texts()]);
      return seen;
    }})()"""
    up, down, other = browser.evaluate(pressed)
    assert up == ["ascending", ["590.0 kB", "600.0 kB", "1.0 MB", "1.0 MB"]]
    assert down == ["descending", ["1.0 MB", "1.0 MB", "600.0 kB", "590.0 kB"]]
    assert other[0] is None and [text.split()[0] for text in other[1]] == ["20.00", "24.00", "24.00", "–"]


def test_names_from_outside_are_text(browser: Page, written: Path) -> None:
    browser.open(written / "hostile.html", 900)
    assert "<script>alert(1)</script>" in browser.evaluate("document.querySelector('h1').textContent")
    assert (
        browser.evaluate("[...document.scripts].filter(script => script.textContent.startsWith('alert')).length") == 0
    )


def test_what_a_screen_reader_needs_is_there(browser: Page, written: Path) -> None:
    browser.open(written / "report.html", 1200)
    assert browser.evaluate("document.documentElement.lang") == "en"
    assert browser.evaluate("document.querySelectorAll('figure').length") == CHARTS
    captions = (
        "[...document.querySelectorAll('figure')].every(f => f.querySelector('figcaption').textContent.length > 40)"
    )
    labels = """[...document.querySelectorAll('[aria-labelledby]')]
        .every(part => document.getElementById(part.getAttribute('aria-labelledby')))"""
    scopes = "[...document.querySelectorAll('th')].every(heading => heading.scope)"
    assert all(map(browser.evaluate, (captions, labels, scopes)))
    assert browser.evaluate("document.querySelectorAll('main, header, nav').length") == 3


def test_a_printed_page_is_white_and_loses_nothing(browser: Page, written: Path) -> None:
    browser.open(written / "report.html", 1200, dark=True)
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
