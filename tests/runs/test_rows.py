"""Rows and gates on results made by hand, whose figures and intervals are plain to see."""

import math
from itertools import product

import pytest

from gblm_compress.measure.timings import NO_SPEED_UP
from gblm_compress.runs.rows import amount, check_gates
from gblm_compress.settings import GateSettings
from tests.runs.reports import measured, model, models

DENSE, PRUNED, BITMASK, UNTIMED = models()
FORWARD = {"timing": BITMASK["timing"] | {"tpot_ms": None}}
ENCODER = BITMASK | FORWARD | {"metrics": {"spearman": (0.84, 0.01, 0.87)}}


def outcomes(*artefacts, **limits):
    gates = check_gates([GateSettings(**limits)], measured(DENSE, *artefacts))
    return {(gate.gate, gate.subject): gate.passed for gate in gates}


# of the bitmask: perplexity 24 of 20, KL 0.2, agreement 0.81, accuracy 0.6 ± 0.098, recovery 0.8–1.0, 600 kB of 1 MB,
# 1.8 MB of memory, TTFT 45–55 ms, TPOT 9–11 ms, 90.9–111.1 tokens/s, speed-ups 1.636–2.444; of the encoder 0.84 of 0.87
@pytest.mark.parametrize(
    ("artefact", "name", "passes", "fails"),
    [
        (BITMASK, "max_perplexity", 24.1, 23.9),
        (BITMASK, "max_perplexity_increase", 0.201, 0.199),
        (BITMASK, "max_mean_kl", 0.2, 0.19),
        (BITMASK, "min_top1_agreement", 0.81, 0.82),
        (BITMASK, "min_task_accuracy", 0.50, 0.51),
        (BITMASK, "min_task_recovery", 0.79, 0.81),
        (BITMASK, "max_bytes_ratio", 0.6, 0.59),
        (BITMASK | {"bytes_on_disk": 6_000_000}, "max_bytes", "6MB", "5.9MB"),
        (BITMASK, "max_memory", "1.8MB", "1.7MB"),
        (BITMASK, "max_ttft_ms", 55.1, 54.9),
        (BITMASK, "max_tpot_ms", 11.1, 10.9),
        (BITMASK, "min_tokens_per_second", 90.8, 91.0),
        (BITMASK, "min_decode_speedup", 1.63, 1.64),
        (BITMASK, "min_prefill_speedup", 1.63, 1.64),
        (ENCODER, "min_retained", 0.965, 0.966),
        (ENCODER, "min_samples_per_second", 18.1, 18.2),
    ],
)
def test_limits_on_both_sides_of_the_worse_end(artefact, name, passes, fails) -> None:
    assert set(outcomes(artefact, **{name: passes}).values()) == {True}
    assert set(outcomes(artefact, **{name: fails}).values()) == {False}


def test_quality_is_that_of_every_artefact_and_bytes_that_of_the_best() -> None:
    worse, name = model("int4", 8.0, 300_000, 30.0), "max_perplexity"
    found = outcomes(PRUNED, BITMASK, worse, UNTIMED, max_perplexity=25.0)
    assert found == {(name, "pruned"): True, (name, "bitmask"): True, (name, "int4"): False}
    assert outcomes(PRUNED, BITMASK, worse, max_bytes_ratio=0.3) == {("max_bytes_ratio", "int4"): True}


def test_a_named_artefact_answers_for_itself() -> None:
    for limit, passed in ((0.9, True), (1.03, False)):  # of 0.84 to 1.25
        gates = GateSettings(min_decode_speedup=limit * 0.84, artefact="pruned")
        (found,) = check_gates([gates], measured(DENSE, BITMASK, PRUNED))
        assert (found.subject, found.passed) == ("pruned in torch, batch 1", passed)
    groups = [GateSettings(artefact=name, max_bytes_ratio=0.9) for name in ("pruned", "bitmask")]
    found = check_gates(groups, measured(DENSE, PRUNED, BITMASK))
    assert [(gate.subject, gate.passed) for gate in found] == [("pruned", False), ("bitmask", True)]


def test_speed_is_the_lower_end_of_the_best_significant_artefact_at_every_batch_size() -> None:
    wider = model("bitmask", 12.0, 600_000, 24.0, batch=4)
    found = check_gates([GateSettings(min_decode_speedup=1.5)], measured(DENSE, PRUNED, BITMASK, wider))
    passed = {gate.subject: gate.passed for gate in found}  # the second ratio of medians is 1.67
    assert passed == {"bitmask in torch, batch 1": True, "bitmask in torch, batch 4": False}
    assert (found[1].measured, found[1].bound) == (pytest.approx(20 / 12), pytest.approx(18 / 13.2))


def test_a_ratio_that_is_not_significant_passes_no_gate() -> None:
    found = outcomes(PRUNED, min_decode_speedup=0.5)  # its interval is 0.84 to 1.25
    assert found == {("min_decode_speedup", f"best of all, pruned in torch, batch 1: {NO_SPEED_UP}"): False}


def test_what_was_not_measured_passes_no_gate() -> None:
    for artefact, limits in (("semi-structured", {"min_decode_speedup": 1.1}), (None, {"max_mean_kl": 1.0})):
        (gate,) = check_gates([GateSettings(artefact=artefact, **limits)], measured(DENSE, UNTIMED))
        subject = f"{artefact or 'all artefacts'}: not measured"
        assert (gate.passed, gate.measured, gate.subject) == (False, None, subject)


def test_a_quality_that_is_not_finite_fails_beside_others_that_pass() -> None:
    for value, name in product((None, math.nan, math.inf), ("max_perplexity", "max_perplexity_increase")):
        broken = BITMASK | {"metrics": {"perplexity": (value, None, 20.0)}}
        found = outcomes(PRUNED, broken, **{name: 1e9})
        assert found == {(name, "pruned"): True, (name, "bitmask: not finite"): False}
        assert {row.value for row in measured(broken) if row.figure.startswith("perplexity")} == {None}


@pytest.mark.parametrize(
    ("figure", "value", "error", "said"),
    [
        ("mean_kl", -1e-9, None, "0.000"),
        ("perplexity", math.nan, None, "not finite"),
        ("perplexity_increase", 0.15, 0.01, "15.0 ±1.0 %"),
        ("tpot_ms", 1234.5, None, "1,234 ms"),
        ("prefill_kernels", 7, None, "7"),
    ],
)
def test_an_amount_has_its_unit_and_digits_that_say_something(figure, value, error, said) -> None:
    assert amount(figure, value, error) == said
