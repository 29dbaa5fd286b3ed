"""The results of a benchmark: times with their spread, beside those of the baseline. Importing it loads no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

Part = Literal["packed products", "dense products", "head", "attention", "rest"]
"""The parts of a decode step."""
NO_SPEED_UP = "no significant speed-up"


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile over the rounds."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """The spread of some measurements."""
        p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
        return Spread(median, p10, p90)


@dataclass(frozen=True)
class Speedup:
    """One model's figure against the baseline's.

    Attributes:
        ratio: baseline median over model median; above 1 is faster.
        low, high: the ends of its interval: the baseline's p10 over the model's p90, and the other way round.
        verdict: the ratio in words, or `NO_SPEED_UP` where the interval holds 1 (the p10–p90 intervals overlap).
    """

    ratio: float
    low: float
    high: float
    verdict: str

    @staticmethod
    def of(baseline: Spread, model: Spread) -> "Speedup":
        """The speed-up of `model`."""
        ratio, low, high = baseline.median / model.median, baseline.p10 / model.p90, baseline.p90 / model.p10
        verdict = f"{ratio:.2f}× faster" if low > 1 else f"{1 / ratio:.2f}× slower" if high < 1 else NO_SPEED_UP
        return Speedup(ratio, low, high, verdict)


@dataclass(frozen=True)
class Measurement:
    """One model at one batch size.

    Attributes:
        ttft_ms: time to first token (prefill), or of the forward pass where nothing is generated.
        tpot_ms: time per output token after the first (decode), averaged over each generation. It and the other
            figures of decode are None where nothing is generated.
        tokens_per_second: generated tokens of all sequences per second of decode, median.
        samples_per_second: samples per second of forward pass, median, where nothing is generated; else None.
        peak_memory_bytes: of the worker process (CPU: resident set, libraries included; CUDA: as
            `machine.memory.peak_memory`).
        prefill_speedup, decode_speedup: against the baseline; None for the baseline itself.
        prefill_kernels, decode_kernels: how often the prompt and a decode step run each kernel of torch's linear
            layers, or each ONNX operator with its execution provider.
        step_ms: the time of each part of a step, profiled after loading and without a prompt; empty where the runtime
            records none.
    """

    model: str
    runtime: str
    provider: str
    dtype: str
    batch: int
    ttft_ms: Spread
    tpot_ms: Spread | None
    tokens_per_second: float | None
    samples_per_second: float | None
    peak_memory_bytes: int
    load_seconds: float
    bytes_on_disk: Annotated[int, Field(gt=0)]
    prefill_kernels: dict[str, int]
    decode_kernels: dict[str, int] | None
    prefill_speedup: Speedup | None = None
    decode_speedup: Speedup | None = None
    same_tokens_as_baseline: bool | None = None
    step_ms: dict[Part, float] = field(default_factory=dict)
