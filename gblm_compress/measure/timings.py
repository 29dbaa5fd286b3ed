"""The results of a benchmark: times with their spread, and the baseline's. Importing it loads no torch."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Part = Literal["packed products", "dense products", "head", "attention", "rest"]
NO_SPEED_UP = "no clear speed difference"


@dataclass(frozen=True)
class Spread:
    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
        return Spread(median, p10, p90)


@dataclass(frozen=True)
class Speedup:
    """One model's figure against the baseline's; above 1 is faster."""

    ratio: float  # of the medians
    low: float  # the baseline's p10 over the model's p90
    high: float  # the baseline's p90 over the model's p10
    verdict: str  # `NO_SPEED_UP` if the two enclose 1

    @staticmethod
    def of(baseline: Spread, model: Spread) -> "Speedup":
        ratio, low, high = baseline.median / model.median, baseline.p10 / model.p90, baseline.p90 / model.p10
        verdict = f"{ratio:.2f}× faster" if low > 1 else f"{1 / ratio:.2f}× slower" if high < 1 else NO_SPEED_UP
        return Speedup(ratio, low, high, verdict)


@dataclass(frozen=True)
class Measurement:
    """One model at one batch size. Figures of decode are None if nothing is generated."""

    model: str
    runtime: str
    provider: str
    dtype: str
    batch: int
    ttft_ms: Spread  # time to first token (prefill), or of the forward pass if nothing is generated
    tpot_ms: Spread | None  # time per output token after the first
    tokens_per_second: float | None  # of all sequences, median of decode
    samples_per_second: float | None  # of forward passes; None if the model generates
    peak_memory_bytes: int  # of the worker process, see `machine.memory.peak_memory`
    load_seconds: float
    bytes_on_disk: int
    prefill_kernels: dict[str, int]  # {kernel or ONNX operator: how often it runs}
    decode_kernels: dict[str, int] | None
    prefill_speedup: Speedup | None = None
    decode_speedup: Speedup | None = None
    step_ms: dict[Part, float] = field(default_factory=dict)  # of each part of a profiled step without a prompt
