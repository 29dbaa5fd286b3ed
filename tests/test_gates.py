from gblm_compress.gates import check_gates
from gblm_compress.settings import GateSettings

EVALUATION = {
    "perplexity": 23.0,
    "baseline_perplexity": 20.0,
    "fidelity": {"mean_kl": 0.2, "top1_agreement": 0.8},
}


def measurement(decode: float, prefill: float = 1.0):
    return {
        "model": "onnx", "runtime": "onnxruntime", "batch": 1,
        "decode_speedup": {"ratio": decode}, "prefill_speedup": {"ratio": prefill},
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


def test_speed_is_that_of_the_best_artefact_at_every_batch_size() -> None:
    gates = GateSettings(min_decode_speedup=1.3, min_prefill_speedup=0.95)
    slow = measurement(1.0, prefill=0.97) | {"model": "pruned", "runtime": "torch"}
    larger = measurement(1.2, prefill=0.9) | {"batch": 4}
    assert outcomes(gates, [BASELINE, measurement(1.4, prefill=0.9), slow, larger]) == {
        ("min_decode_speedup", "onnx in onnxruntime, batch 1"): True,
        ("min_prefill_speedup", "pruned in torch, batch 1"): True,
        ("min_decode_speedup", "onnx in onnxruntime, batch 4"): False,
        ("min_prefill_speedup", "onnx in onnxruntime, batch 4"): False,
    }
