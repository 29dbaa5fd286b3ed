"""Gates on rows made by hand, whose figures and intervals are plain to see."""

from dataclasses import replace

import pytest

from gblm_compress.measure.timings import NO_SPEED_UP, Speedup, Spread
from gblm_compress.runs.figures import figures
from gblm_compress.runs.gates import check_gates
from gblm_compress.runs.summary import Quality
from gblm_compress.settings import GATES, GateSettings
from tests.runs.reports import report, row

DENSE, PRUNED, BITMASK, UNTIMED = report().rows


def outcomes(*rows, **limits):
    return {(gate.gate, gate.subject): gate.passed for gate in check_gates([GateSettings(**limits)], [DENSE, *rows])}


def test_unset_gates_are_not_checked() -> None:
    assert check_gates([GateSettings()], [DENSE, PRUNED]) == check_gates([], [DENSE, PRUNED]) == []


def test_every_gate_is_on_a_figure_that_is_measured() -> None:
    encoder = replace(
        BITMASK,
        metrics={"spearman": Quality(0.84, 0.01, 0.87)},
        timing=replace(BITMASK.timing, tpot_ms=None, tokens_per_second=None),
    )
    assert set(outcomes(encoder, min_retained=0.965).values()) == {True}  # 0.84 of 0.87
    assert set(outcomes(encoder, min_retained=0.966).values()) == {False}
    found = {**figures(BITMASK, DENSE.bytes_on_disk), **figures(encoder, DENSE.bytes_on_disk)}
    assert {name[4:] for name in GATES} <= set(found)
    assert all(name.startswith(("min_", "max_")) for name in GATES)


# of the bitmask row: perplexity 24 of 20, KL 0.2, agreement 0.81, accuracy 0.6 ± 0.098, recovery 0.8–1.0, 600 kB of
# 1 MB, 1.8 MB of memory, TTFT 45–55 ms, TPOT 9–11 ms, 90.9–111.1 tokens/s, speed-ups 1.636–2.444
@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("max_perplexity", 24.1, 23.9),
        ("max_perplexity_increase", 0.201, 0.199),
        ("max_mean_kl", 0.2, 0.19),
        ("min_top1_agreement", 0.81, 0.82),
        ("min_task_accuracy", 0.50, 0.51),
        ("min_task_recovery", 0.79, 0.81),
        ("max_bytes_ratio", 0.6, 0.59),
        ("max_ttft_ms", 55.1, 54.9),
        ("max_tpot_ms", 11.1, 10.9),
        ("min_tokens_per_second", 90.8, 91.0),
        ("min_decode_speedup", 1.63, 1.64),
        ("min_prefill_speedup", 1.63, 1.64),
    ],
)
def test_limits_on_both_sides_of_the_worse_end(name, passes, fails) -> None:
    assert set(outcomes(BITMASK, **{name: passes}).values()) == {True}
    assert set(outcomes(BITMASK, **{name: fails}).values()) == {False}


def test_a_share_of_a_metric_is_kept() -> None:
    encoder = replace(BITMASK, metrics={"spearman": Quality(0.8, 0.01, 0.85)})
    for limit, passed in ((0.94, True), (0.95, False)):  # 0.941 is kept
        assert outcomes(encoder, min_retained=limit) == {("min_retained", "bitmask"): passed}
    assert outcomes(BITMASK, min_retained=0.1) == {("min_retained", "all artefacts: not measured"): False}


def test_bytes_are_written_with_a_unit() -> None:
    large = replace(BITMASK, bytes_on_disk=6_000_000)
    assert outcomes(large, max_bytes="6MB") == {("max_bytes", "bitmask"): True}
    assert outcomes(large, max_bytes="5.9MB") == {("max_bytes", "bitmask"): False}
    assert outcomes(BITMASK, max_memory="1.8MB") == {("max_memory", "bitmask in torch, batch 1"): True}


def test_quality_is_that_of_every_artefact_and_bytes_that_of_the_best() -> None:
    worse = replace(row("int4", 8.0, 300_000, 30.0), fidelity={})
    assert outcomes(PRUNED, BITMASK, worse, UNTIMED, max_perplexity=25.0) == {
        ("max_perplexity", "pruned"): True, ("max_perplexity", "bitmask"): True, ("max_perplexity", "int4"): False,
    }  # fmt: skip
    assert outcomes(PRUNED, BITMASK, worse, max_bytes_ratio=0.3) == {("max_bytes_ratio", "int4"): True}


def test_a_named_artefact_answers_for_itself() -> None:
    for limit, passed in ((0.9, True), (1.03, False)):  # of 0.84 to 1.25
        gates = GateSettings(min_decode_speedup=limit * 0.84, artefact="pruned")
        (found,) = check_gates([gates], [DENSE, BITMASK, PRUNED])
        assert (found.subject, found.passed) == ("pruned in torch, batch 1", passed)


def test_artefacts_have_limits_of_their_own() -> None:
    groups = [
        GateSettings(artefact="pruned", max_bytes_ratio=0.9),
        GateSettings(artefact="bitmask", max_bytes_ratio=0.9),
    ]
    found = check_gates(groups, [DENSE, PRUNED, BITMASK])
    assert [(gate.subject, gate.passed) for gate in found] == [("pruned", False), ("bitmask", True)]


def test_speed_is_the_lower_end_of_the_best_significant_artefact_at_every_batch_size() -> None:
    wider = row("bitmask", 12.0, 600_000, 24.0, batch=4)
    found = check_gates([GateSettings(min_decode_speedup=1.5)], [DENSE, PRUNED, BITMASK, wider])
    assert [(g.subject, g.passed) for g in found] == [
        ("bitmask in torch, batch 1", True),
        ("bitmask in torch, batch 4", False),  # its ratio of medians is 1.67
    ]
    assert (found[1].measured, found[1].bound) == (pytest.approx(20 / 12), pytest.approx(18 / 13.2))


def test_a_ratio_that_is_not_significant_passes_no_gate() -> None:
    """Of noisy timings: 2.2 times as fast by its medians, and no verdict."""
    noisy = Speedup.of(Spread(2.2, 0.9, 3.0), Spread(1.0, 0.8, 1.5))
    assert noisy.verdict == NO_SPEED_UP and noisy.ratio == 2.2
    timed = replace(PRUNED, timing=replace(PRUNED.timing, decode_speedup=noisy))
    (outcome,) = check_gates([GateSettings(min_decode_speedup=1.3)], [DENSE, timed])
    assert not outcome.passed and outcome.bound == pytest.approx(0.6) and NO_SPEED_UP in outcome.subject


def test_what_was_not_measured_passes_no_gate() -> None:
    encoder = replace(UNTIMED, metrics={})
    (timed,) = check_gates([GateSettings(min_decode_speedup=1.1, artefact="semi-structured")], [DENSE, UNTIMED])
    (liked,) = check_gates([GateSettings(max_mean_kl=1.0)], [DENSE, encoder])
    assert (timed.passed, timed.measured, timed.subject) == (False, None, "semi-structured: not measured")
    assert (liked.passed, liked.measured, liked.subject) == (False, None, "all artefacts: not measured")
