import pytest

from gblm_compress.errors import UsageError
from gblm_compress.measure.benchmarking import NO_SPEED_UP, Speedup, Spread
from gblm_compress.runs.gates import check_gates
from gblm_compress.settings import GateSettings

EVALUATION = {
    "perplexity": 23.0,
    "baseline_perplexity": 20.0,
    "fidelity": {"mean_kl": 0.2, "top1_agreement": 0.8},
}


def speedup(low: float):
    """A speed-up whose interval begins at `low`."""
    return {"ratio": 1.1 * low, "low": low, "high": 1.2 * low}


def measurement(decode: float, prefill: float = 1.0):
    return {
        "model": "onnx", "runtime": "onnxruntime", "batch": 1,
        "decode_speedup": speedup(decode), "prefill_speedup": speedup(prefill),
    }  # fmt: skip


BASELINE = {"model": "dense", "runtime": "torch", "batch": 1, "decode_speedup": None, "prefill_speedup": None}


def outcomes(gates: GateSettings, measurements=()):
    return {(g.gate, g.subject): g.passed for g in check_gates(gates, EVALUATION, list(measurements))}


def test_unset_gates_are_not_checked() -> None:
    assert check_gates(GateSettings(), EVALUATION, [measurement(0.1)]) == []


def test_limits_on_both_sides() -> None:
    for limit, passed in ((0.151, True), (0.149, False)):
        assert outcomes(GateSettings(max_perplexity_increase=limit)) == {("max_perplexity_increase", "pruned"): passed}
    assert outcomes(GateSettings(max_mean_kl=0.1, min_top1_agreement=0.8)) == {
        ("max_mean_kl", "pruned"): False,
        ("min_top1_agreement", "pruned"): True,
    }


def test_a_share_of_the_dense_metric_is_kept() -> None:
    evaluation = {"metrics": ["spearman"], "spearman": 0.84, "baseline_spearman": 0.87, "fidelity": {"cosine": 0.9}}
    for limit, passed in ((0.965, True), (0.966, False)):
        (gate,) = check_gates(GateSettings(min_retained=limit), evaluation, [])
        assert gate.passed is passed and gate.measured == pytest.approx(0.84 / 0.87)
    (gate,) = check_gates(GateSettings(min_retained=0.5), EVALUATION | {"metrics": ["perplexity"]}, [])
    assert not gate.passed  # of a perplexity no share is kept


def test_speed_is_the_lower_end_of_the_best_significant_artefact_at_every_batch_size() -> None:
    gates = GateSettings(min_decode_speedup=1.3, min_prefill_speedup=1.01)
    slow = measurement(1.0, prefill=1.02) | {"model": "pruned", "runtime": "torch"}
    larger = measurement(1.25, prefill=0.9) | {"batch": 4}
    found = check_gates(gates, EVALUATION, [BASELINE, measurement(1.4, prefill=0.9), slow, larger])
    assert [(g.gate, g.subject, g.passed) for g in found] == [
        ("min_decode_speedup", "onnx in onnxruntime, batch 1", True),
        ("min_decode_speedup", "onnx in onnxruntime, batch 4", False),  # its ratio of medians is 1.375
        ("min_prefill_speedup", "pruned in torch, batch 1", True),
        ("min_prefill_speedup", f"best of all, onnx in onnxruntime, batch 4: {NO_SPEED_UP}", False),
    ]
    assert (found[1].measured, found[1].low) == (pytest.approx(1.375), 1.25)


def test_a_ratio_that_is_not_significant_passes_no_gate() -> None:
    """A model stored dense, of noisy timings: 2.2 times as fast by its medians, and no verdict."""
    noisy = Speedup.of(Spread(2.2, 0.9, 3.0), Spread(1.0, 0.8, 1.5))
    assert noisy.verdict == NO_SPEED_UP and noisy.ratio == 2.2
    timed = measurement(1.0) | {"decode_speedup": vars(noisy)}
    (outcome,) = check_gates(GateSettings(min_decode_speedup=1.3), EVALUATION, [timed])
    assert not outcome.passed and outcome.low == pytest.approx(0.6) and NO_SPEED_UP in outcome.subject


def test_a_named_artefact_answers_for_itself() -> None:
    fast, slow = measurement(2.0), measurement(0.95) | {"model": "pruned", "runtime": "torch"}
    for limit, passed in ((0.9, True), (0.96, False)):
        gates = GateSettings(min_decode_speedup=limit, artefact="pruned")
        assert outcomes(gates, [fast, slow]) == {("min_decode_speedup", "pruned in torch, batch 1"): passed}


def test_a_speed_gate_on_what_was_not_timed_does_not_pass_silently() -> None:
    with pytest.raises(UsageError, match="is on bitmask, which was not timed"):
        check_gates(GateSettings(min_decode_speedup=1.1, artefact="bitmask"), EVALUATION, [measurement(1.4)])
    with pytest.raises(UsageError, match="was not timed"):
        check_gates(GateSettings(min_decode_speedup=1.1), EVALUATION, [BASELINE])
