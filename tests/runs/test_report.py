"""The report as tables and files: names from outside bend none of it, and it says what was measured."""

import math
from unittest.mock import MagicMock
from xml.etree import ElementTree

import pytest

from gblm_compress.cli import summaries
from gblm_compress.errors import OutputError, UsageError
from gblm_compress.measure.timings import NO_SPEED_UP
from gblm_compress.printing import PlainConsole
from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report, tables
from gblm_compress.runs.rows import Row
from gblm_compress.runs.run_report import headline, verdict
from gblm_compress.storage.outputs import JUNIT, PAGE, SUMMARY
from tests.runs.reports import HOSTILE, in_8_bits, measured, model, models, report, write_report


def test_names_from_outside_neither_end_nor_bend_the_report(tmp_path, capsys) -> None:
    """Markup, formulas, escapes and bytes that are no UTF-8, in the terminal and in every file."""
    hostile = report(HOSTILE)
    console = PlainConsole(width=200, force_terminal=True, color_system="standard")
    for table in tables.of(hostile):
        for part in summaries.titled(table):
            console.show(part)
    shown = capsys.readouterr().out
    assert r"[/]$\frac{$\x1b[2J\udcff<script>" in shown and "\x1b[2J" not in shown and "\x1b[1;31mno" in shown

    (tmp_path / documents.PICTURES).touch()
    with pytest.raises(OutputError, match="cannot be written"):
        documents.write(hostile, tmp_path)
    (tmp_path / documents.PICTURES).unlink()
    documents.write(hostile, tmp_path)
    assert run_report.read(tmp_path) == hostile
    page = (tmp_path / documents.PAGE).read_text(encoding="utf-8")
    assert r"[/]$\frac{$\x1b[2J\udcff&lt;script&gt;" in page and "\x1b" not in page and "<script>alert" not in page
    assert page.count("<script") == 1 and 'src="http' not in page and 'href="http' not in page
    assert "@media print {" in page and ">40 % smaller<" in page and ">compared with the dense model<" in page
    assert len(list((tmp_path / documents.PICTURES).iterdir())) == page.count("data:image/png") == 7
    markdown = documents.markdown(hostile)
    for kind, content in ((PAGE, page), (SUMMARY, markdown), (JUNIT, documents.junit(hostile))):
        (tmp_path / f"own{kind.suffix}").write_text(content, encoding="utf-8")
        kind.check(tmp_path / f"own{kind.suffix}")  # it is known as our own, which may be replaced
    assert "<script>" not in markdown and "\x1b" not in markdown and r"\|\`" in markdown
    assert all(line.count(" | ") == 5 for line in markdown.splitlines() if line.startswith("| max"))
    assert ElementTree.fromstring(documents.junit(hostile)).get("failures") == "1"


def test_a_chart_that_fails_leaves_the_figures(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents.charts, "of", MagicMock(side_effect=RuntimeError("no picture")))
    with pytest.raises(RuntimeError, match="no picture"):
        documents.write(report(), tmp_path)
    assert run_report.read(tmp_path) == report()


def test_the_headline_is_size_speed_and_quality_of_the_fastest() -> None:
    assert headline(report()) == (
        "40 % smaller (1.0 MB → 600.0 kB), 2.00× as fast (1.64× to 2.44×, 20.00 → 10.00 ms per token, prompts 2.00× as "
        "fast), perplexity +20 % (20.00 → 24.00 ±0.50), the same answer in 81 % of tokens, 0.900× the accuracy on "
        "tasks [0.80–1.00]: bitmask compared with the dense model, on a CPU, 2 threads, cpu, torch, batch 1."
    )
    assert headline(report(rows=[])) == "Nothing was measured."
    said = "no clear speed difference (0.98×, 0.80× to 1.19×, 20.00 → 20.50 ms per token, prompts without a clear"
    assert said in headline(report(rows=measured(models()[0], model("onnx", 20.5, 990_000, 24.0))))


def test_a_sentence_of_the_headline_has_one_baseline() -> None:
    same, other = headline(report(rows=measured(models()[0], *in_8_bits()))).split(" Compared with the dense model: ")
    assert same.startswith("40 % smaller (300.0 kB → 180.0 kB), 2.00× as fast (1.64× to 2.44×")
    assert same.endswith("onnx-int8 compared with dense-onnx-int8, on a CPU, 2 threads, cpu, onnxruntime, batch 1.")
    assert other.startswith("perplexity +20 % (20.00 → 24.00 ±0.50), 82 % smaller (1.0 MB → 180.0 kB), the same answer")
    own, of_dense = in_8_bits()
    alike = report(rows=measured(models()[0], own, of_dense | {"metrics": {"perplexity": (20.5, 0.4, 20.0)}}))
    assert "perplexity +17 % (20.50 → 24.00 ±0.50): onnx-int8 compared" in headline(alike)


def with_metric(name: str, *values: float | None):
    """The pruned model, whose value, error and dense value of a metric are these."""
    return models()[1] | {"metrics": {name: values}}


@pytest.mark.parametrize(
    ("artefact", "size", "speed", "quality"),
    [
        (model("same", 10.0, 1_002_000, None), "same size", ("2.00× as fast", "good"), ("quality not measured", "")),
        (model("large", None, 1_100_000, 20.005), "10 % larger", ("speed not measured", ""), ("same perplexity", "")),
        (model("nan", 20.0, 500_000, math.nan), "50 % smaller", (NO_SPEED_UP, ""), ("perplexity not finite", "bad")),
        (model("worse", 40.0, 500_000, 20.5), "50 % smaller", ("0.50× as fast", "bad"), ("perplexity +2.5 %", "bad")),
        (model("better", 20.0, 500_000, 10.0), "50 % smaller", (NO_SPEED_UP, ""), ("perplexity −50 %", "good")),
        (with_metric("accuracy", 0.9, 0.01, 0.92), "same size", (NO_SPEED_UP, ""), ("accuracy −2.0 points", "bad")),
        (with_metric("spearman", 0.87, 0.01, 0.86), "same size", (NO_SPEED_UP, ""), ("spearman +1.2 %", "good")),
        (with_metric("cross_entropy", 3.0, None, None), "same size", (NO_SPEED_UP, ""), ("cross entropy 3.00", "")),
    ],
)
def test_the_tiles_claim_what_was_measured_and_no_more(artefact, size, speed, quality) -> None:
    of_dense = {name: (dense, None, None) for name, (_, _, dense) in artefact["metrics"].items()}
    found = verdict(report(rows=measured(models()[0] | {"metrics": of_dense}, artefact)))
    assert [(tile.figure, tile.mark) for tile in found.tiles[1:]] == [speed, quality]
    assert found.tiles[0].figure == size and all(tile.beside == "dense" for tile in found.tiles)


def test_junit_and_markdown_name_what_failed() -> None:
    suite = ElementTree.fromstring(documents.junit(report()))
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == ("2", "1", "3.250")
    properties, passed, failed = suite
    assert properties[0].attrib == {"name": "machine", "value": "a CPU, 2 threads, cpu"}
    assert passed.find("failure") is None
    assert failed.find("failure").get("message") == "max_bytes on bitmask: 600.0 kB; at most 500.0 kB is needed"
    lines = documents.markdown(report()).splitlines()
    assert lines[1] == "## FAIL: bitmask: 50 % zeros by gblm"
    assert "- max\\_bytes on bitmask: 600.0 kB; at most 500.0 kB is needed" in lines
    assert "| min\\_decode\\_speedup | bitmask in torch, batch 1 | 1.30× | 2.00× | 1.60× | yes |" in lines


def test_what_was_not_measured_is_said_to_be_so() -> None:
    by_title = {table.title: table for table in tables.of(report())}
    assert list(by_title) == [
        "Gates", "Quality and size", "Speed and memory", "Tasks", "Kernels that ran", "Pruned layers",
        "Recovery", "Stages",
    ]  # fmt: skip
    quality, speed = by_title["Quality and size"], by_title["Speed and memory"]
    (absent,) = [line for line in quality.rows if line[0].text == "semi-structured"]
    assert [cell.text for cell in absent] == ["semi-structured", "–", "–", "–", "50.0 %", "590.0 kB", "0.590×"]
    assert quality.all_notes[-1] == "–: not measured."
    assert "Not timed: semi-structured." in speed.notes
    assert [cell.text for cell in speed.rows[2]] == [
        "bitmask", "torch", "1", "50.00", "10.00", "100.00", "2.00× [1.64–2.44]", "1.8 MB"
    ]  # fmt: skip
    assert [cell.text for cell in speed.rows[0]][-2:] == ["dense", "3.0 MB"]


def test_a_report_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no report"):
        run_report.read(tmp_path)
    for text, message in (("{}", "recipe: Field required"), ("[", "Expecting value"), ("[]", "it holds a list")):
        (tmp_path / run_report.REPORT).write_text(text)
        with pytest.raises(UsageError, match=f"is not a report that this version reads .{message}"):
            run_report.read(tmp_path)


@pytest.mark.parametrize(
    ("figure", "was", "now", "verdict"),
    [
        ("tpot_ms", (10, 9, 11), (12, 11.5, 13), "worse"),
        ("tpot_ms", (10, 9, 11), (12, 10.9, 13), "same"),
        ("tpot_ms", (10, 9, 11), (8, 7, 8.9), "better"),
        ("decode_speedup", (2, 1.8, 2.2), (1.5, 1.4, 1.7), "worse"),
        ("perplexity", (20,), (20.1,), "same"),
        ("perplexity", (20,), (20.3,), "worse"),
        ("top1_agreement", (0.8,), (0.9,), "better"),
        ("spearman", (-0.5,), (-0.5,), "same"),
        ("spearman", (-0.5,), (-0.4,), "better"),
    ],
)
def test_worse_is_what_the_intervals_leave_no_doubt_about(figure, was, now, verdict) -> None:
    assert tables.compared(Row("bitmask", figure, *was), Row("bitmask", figure, *now)) == verdict


def test_what_got_worse_comes_first_and_only_two_runs_are_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents.charts, "of", lambda report: [])
    page, before, now = (tmp_path / name for name in ("page.html", "before", "now"))
    write_report(before)
    write_report(now, tpot=14.0, perplexity=25.0)
    found = documents.report([before, now], page)
    verdicts = [line[-1].text for line in found.changes.rows]
    assert verdicts == sorted(verdicts, key=("worse", "better", "same").index)
    said = found.as_dict()["regressions"]
    assert {"bitmask in torch, batch 1: TPOT 10.00 ms → 14.00 ms", "pruned: perplexity 24.00 → 25.00"} <= {*said}
    assert not [line for line in said if line.startswith("dense")] and "with the previous one" in page.read_text()
    for folders in ([before], [before, before]):
        assert documents.report(folders, page).regressions == []
    for folders in ([], [before] * 3):
        with pytest.raises(UsageError, match="give one folder"):
            documents.report(folders, page)


def test_times_are_compared_in_one_place_and_other_figures_anywhere() -> None:
    _, pruned, bitmask, _ = models(tpot=14.0, perplexity=25.0)
    moved = [each | {"timing": each["timing"] | {"batch": 8}} for each in (pruned, bitmask)]
    table = tables.changes(report(), report(rows=measured(models()[0], *moved)))
    assert [(line[0].text, line[1].text) for line in table.rows if line[-1].text == "worse"] == [
        ("pruned", "perplexity"), ("bitmask", "perplexity"),
    ]  # fmt: skip
    assert "Measured before, but not now or not in the same way: memory of pruned, TTFT of pruned" in table.notes[1]
    assert len(tables.changes(report(), report()).notes) == 1
    other = tables.changes(report("onnx"), report("bitmask"))
    assert {line[0].text.split(" ")[0] for line in other.rows} == {"dense", "pruned", "semi-structured"}


def test_the_metrics_of_a_new_task_are_compared_and_a_change_from_zero_has_no_share() -> None:
    def encoder(spearman: float, cosine: float):
        dense, pruned, *_ = models()
        metrics = dict.fromkeys(("spearman", "of_a_new_task"), (spearman, None, 0.8))
        of_dense = dict.fromkeys(metrics, (0.8, None, None))
        alike = {"metrics": metrics, "fidelity": {"cosine": cosine}}
        return report(rows=measured(dense | {"metrics": of_dense}, pruned | alike))

    rows = tables.changes(encoder(0.8, 0.0), encoder(0.7, -0.1)).rows
    worse = [(line[1].text, line[4].text) for line in rows if line[-1].text == "worse"]
    assert worse == [("spearman", "-12.5 %"), ("of a new task", "-12.5 %"), ("cosine", "")]
    quality = next(table for table in tables.of(encoder(0.8, 0.99)) if table.title == "Quality and size")
    assert list(quality.columns) == ["model", "spearman", "cosine", "nonzero", "on disk", "of dense"]
