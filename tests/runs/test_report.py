"""What is written of a run: names from outside bend none of it, and what it says is what was measured."""

import json
from xml.etree import ElementTree

import pytest

from gblm_compress.cli import summaries
from gblm_compress.errors import UsageError
from gblm_compress.printing import PlainConsole
from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report, tables
from gblm_compress.runs.run_report import headline, number
from tests.runs.reports import HOSTILE, report, row


def test_names_from_outside_neither_end_nor_bend_the_report(tmp_path, capsys) -> None:
    """Markup, formulas, escapes and bytes that are no UTF-8, in the terminal and in every file."""
    hostile = report(HOSTILE)
    console = PlainConsole(width=200, force_terminal=True, color_system="standard")
    for table in tables.of(hostile):
        for part in summaries.titled(table):
            summaries.print_part(part, console)
    shown = capsys.readouterr().out
    assert r"[/]$\frac{$\x1b[2J\udcff<script>" in shown and "\x1b[2J" not in shown and "\x1b[1;31mno" in shown

    documents.write(hostile, tmp_path)
    assert json.loads((tmp_path / run_report.REPORT).read_text())["model"] == HOSTILE
    assert run_report.read(tmp_path) == hostile
    page = (tmp_path / documents.PAGE).read_text(encoding="utf-8")
    assert r"[/]$\frac{$\x1b[2J\udcff&lt;script&gt;" in page and "\x1b" not in page and "<script>alert" not in page
    assert len(list((tmp_path / documents.PICTURES).iterdir())) == 12
    markdown = documents.markdown(hostile)
    assert "<script>" not in markdown and "\x1b" not in markdown and r"\|\`" in markdown
    assert all(line.count(" | ") == 5 for line in markdown.splitlines() if line.startswith("| max"))
    assert ElementTree.fromstring(documents.junit(hostile)).get("failures") == "1"


def test_the_headline_is_size_speed_and_quality_of_the_fastest() -> None:
    assert headline(report()) == (
        "bitmask: 0.60× the bytes of the dense model, decodes 2.00× as fast [1.64–2.44], "
        "perplexity 20.00 → 24.00 ±0.50, the same answer as dense in 81 % of tokens, "
        "0.90× the accuracy on tasks [0.80–1.00]; on a CPU, 2 threads, cpu, torch, batch 1."
    )


def test_a_speed_up_that_is_none_is_called_so() -> None:
    rows = report().rows
    slow = report(rows=[rows[0], row("onnx", 20.5, 990_000, 24.0)])
    assert "decodes no faster for sure (0.98× [0.80–1.19])" in headline(slow)
    slower = report(rows=[rows[0], row("onnx", 30.0, 990_000, 24.0)])
    assert "0.67× as fast [0.55–0.81], which is slower" in headline(slower)


def test_junit_and_markdown_name_what_failed() -> None:
    suite = ElementTree.fromstring(documents.junit(report()))
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == ("2", "1", "3.250")
    passed, failed = suite
    assert passed.find("failure") is None
    assert failed.find("failure").get("message") == "max_bytes on bitmask: 600.0 kB; at most 500.0 kB is needed"
    lines = documents.markdown(report()).splitlines()
    assert lines[1] == "## FAIL: bitmask: 50 % zeros by gblm"
    assert "- max\\_bytes on bitmask: 600.0 kB; at most 500.0 kB is needed" in lines
    assert "| min\\_decode\\_speedup | bitmask in torch, batch 1 | 1.30× | 2.00× | 1.60× | yes |" in lines


def test_what_was_not_measured_is_said_to_be_so() -> None:
    by_title = {table.title: table for table in tables.of(report())}
    quality, speed = by_title["Quality and size"], by_title["Speed and memory"]
    (absent,) = [line for line in quality.rows if line[0].text == "semi-structured"]
    assert [cell.text for cell in absent] == ["semi-structured", "–", "–", "–", "50.0 %", "590.0 kB", "0.59×"]
    assert quality.all_notes[-1] == "– was not measured."
    assert "Not timed: semi-structured." in speed.notes
    assert [cell.text for cell in speed.rows[2]] == [
        "bitmask", "torch", "1", "50.0", "10.0", "100.0", "2.00 [1.64–2.44]", "1.8 MB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "recipe: Field required"), ("[", "Expecting value"), ("[]", "it holds a list"), (None, "holds no report")],
)
def test_a_report_that_is_none(tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / run_report.REPORT).write_text(content)
    with pytest.raises(UsageError, match=message):
        run_report.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["rows"][0].update(bytes_on_disk=0), "rows.0.bytes_on_disk: "),
        (lambda content: content["rows"][0]["timing"]["step_ms"].update(thought=1.0), "rows.0.timing.step_ms"),
        (lambda content: content["layers"][0].update(weights=0), "layers.0.weights: "),
    ],
)
def test_a_report_of_impossible_figures_is_refused(tmp_path, change, message) -> None:
    content = json.loads(json.dumps(report().as_dict()))
    (tmp_path / run_report.REPORT).write_text(json.dumps(content))
    run_report.read(tmp_path)
    change(content)
    (tmp_path / run_report.REPORT).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        run_report.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "said"), [(21.454, "21.45"), (0.3691, "0.369"), (-1e-9, "0.000"), (float("nan"), "not finite")]
)
def test_a_figure_has_digits_that_say_something_and_no_sign_of_rounding(value, said) -> None:
    assert number(value) == said
