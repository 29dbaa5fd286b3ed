"""Several runs beside each other."""

from dataclasses import replace

import pytest

from gblm_compress.runs import history
from gblm_compress.runs.figures import Figure
from gblm_compress.runs.run_report import RunReport
from gblm_compress.runs.summary import Quality
from tests.runs.reports import report


@pytest.mark.parametrize(
    ("name", "was", "now", "verdict"),
    [
        ("tpot_ms", Figure(10, 9, 11), Figure(12, 11.5, 13), "worse"),
        ("tpot_ms", Figure(10, 9, 11), Figure(12, 10.9, 13), "same"),
        ("tpot_ms", Figure(10, 9, 11), Figure(8, 7, 8.9), "better"),
        ("decode_speedup", Figure(2, 1.8, 2.2), Figure(1.5, 1.4, 1.7), "worse"),
        ("perplexity", Figure(20), Figure(20.1), "same"),
        ("perplexity", Figure(20), Figure(20.3), "worse"),
        ("top1_agreement", Figure(0.8), Figure(0.9), "better"),
        ("cross_entropy", Figure(2.0), Figure(2.1), "worse"),
        ("spearman", Figure(0.8), Figure(0.7), "worse"),
        ("spearman", Figure(-0.5), Figure(-0.5), "same"),
        ("spearman", Figure(-0.5), Figure(-0.4), "better"),
    ],
)
def test_worse_is_what_the_intervals_leave_no_doubt_about(name, was, now, verdict) -> None:
    assert history.compared(name, was, now) == verdict


def test_what_got_worse_comes_first_and_is_named() -> None:
    table = history.changes(report(), report(tpot=14.0, perplexity=25.0))
    verdicts = [line[-1].text for line in table.rows]
    assert verdicts == sorted(verdicts, key=history.ORDER.__getitem__)
    worse = history.regressions(table)
    assert "bitmask in torch, batch 1: TPOT 10.00 → 14.00" in worse
    assert "pruned in torch: perplexity 24.00 → 25.00" in worse
    assert not [line for line in worse if line.startswith("dense")]
    assert history.regressions(history.changes(report(), report())) == []


def test_whatever_a_task_measures_is_compared_by_itself_alone() -> None:
    def encoder(spearman: float, cosine: float) -> RunReport:
        found = report()
        pruned = replace(
            found.rows[1],
            metrics={"spearman": Quality(spearman, None, 0.8), "of_a_new_task": Quality(spearman, None, 0.8)},
            fidelity={"cosine": cosine, "top10_agreement": 0.9},
        )
        return replace(found, rows=[found.rows[0], pruned])

    assert history.regressions(history.changes(encoder(0.8, 0.99), encoder(0.7, 0.9))) == [
        "pruned in torch: Spearman's correlation 0.800 → 0.700",
        "pruned in torch: of a new task 0.800 → 0.700",
        "pruned in torch: cosine with dense 0.990 → 0.900",
    ]


def test_quality_and_bytes_are_compared_whatever_is_timed() -> None:
    now = report(tpot=14.0, perplexity=25.0)
    now = replace(now, rows=[replace(row, batch=8, dtype="bfloat16") for row in now.rows])
    table = history.changes(report(), now)
    assert history.regressions(table) == [
        "pruned in torch: perplexity 24.00 → 25.00", "bitmask in torch: perplexity 24.00 → 25.00",
    ]  # fmt: skip
    assert {row[2].text for row in table.rows} >= {"perplexity", "bytes on disk", "KL divergence", "task accuracy"}
    assert "Measured before and not now, or not in the same way: peak memory of dense, TTFT of dense" in table.notes[1]
    assert len(history.changes(report(), report()).notes) == 1


def test_an_artefact_of_one_run_alone_is_not_compared() -> None:
    table = history.changes(report("onnx"), report("bitmask"))
    assert {line[0].text for line in table.rows} == {"dense", "pruned", "semi-structured"}


def test_the_page_says_what_got_worse_and_which_conditions_differ() -> None:
    slower = replace(report(tpot=14.0), conditions={"machine": "another CPU", "timing": "bitmask"})
    page = history.html([report(), report(), slower])
    assert "3 runs of bitmask" in page and "Worse than before: " in page
    assert "bitmask in torch, batch 1: TPOT 10.00 → 14.00" in page
    assert "machine, before" in page and "timing, before" not in page
