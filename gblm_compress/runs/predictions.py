"""What can be made of a model, what is predicted of it, and what follows in words; `advice` makes the predictions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gblm_compress.kernels import cpu
from gblm_compress.machine import busy_cores

WORTH = 1.15
"""A gain below this is not worth the quality that pruning takes."""


@dataclass(frozen=True)
class Way:
    """One thing that can be made of a model.

    Attributes:
        pruned: whether of the pruned one.
        export: how it is written; None for the folder itself.
        dtype: of the folder in torch, where it is that.
    """

    name: str
    pruned: bool = False
    export: dict[str, Any] | None = None
    dtype: str = "auto"

    @property
    def bits(self) -> int | None:
        """To how many bits weights are rounded; None for floating-point numbers."""
        said = "" if self.export is None else self.export.get("quantise") or self.export["format"]
        return next((bits for bits in (8, 4) if said.endswith(f"int{bits}")), None)


WAYS = (
    Way("dense, torch float32", dtype="float32"),
    Way("dense, torch bfloat16", dtype="bfloat16"),
    Way("dense, ONNX float32", export={"format": "onnx", "dtype": "float32"}),
    Way("dense, ONNX int8", export={"format": "onnx", "quantise": "int8"}),
    Way("dense, ONNX int4", export={"format": "onnx", "quantise": "int4"}),
    Way("packed, torch bitmask", True, {"format": "bitmask"}),
    Way("packed, torch bitmask-int8", True, {"format": "bitmask-int8"}),
    Way("packed, ONNX float16", True, {"format": "onnx", "dtype": "float16", "kernels": True}),
    Way("packed, ONNX int8", True, {"format": "onnx", "quantise": "int8", "kernels": True}),
    Way("packed, ONNX int4", True, {"format": "onnx", "quantise": "int4", "kernels": True}),
)
"""All that is tried."""


@dataclass(frozen=True)
class Prediction:
    """What is to be expected of the whole model in one way.

    Attributes:
        pruned, bits: as of the way.
        bytes: of the weights.
        ms_per_token: of a decode step of one sequence.
        low, high: the same from the ends of both measurements, the 10th and 90th percentiles.
    """

    name: str
    pruned: bool
    bits: int | None
    bytes: int
    ms_per_token: float
    low: float
    high: float

    @property
    def changes(self) -> tuple[bool, int]:
        """How much of the weights is lost, in the order that docs/quality.md found on text unlike the calibration's:
        nothing, 8 bits, 4 bits, and the same with zeros."""
        return self.pruned, -(self.bits or 16)


TARGETS: dict[str, Callable[[Prediction], Any]] = {
    "bytes": lambda prediction: prediction.bytes,
    "latency": lambda prediction: prediction.ms_per_token,
    "quality": lambda prediction: (prediction.changes, prediction.ms_per_token),
}
"""What is to be small, or well kept."""


def sentences(predictions: Sequence[Prediction], target: str) -> Iterator[str]:
    """What follows from the predictions, in words."""
    yield from _of_quality(predictions) if target == "quality" else _of_cost(predictions, target)
    if busy_cores() > 0.5:
        yield "Other programs were running: ask again on a quiet machine before you trust the times."
    if not cpu.available():
        yield "This package's kernels were not built, so that packed layers are restored for every product."


def _of_quality(predictions: Sequence[Prediction]) -> Iterator[str]:
    best = min(predictions, key=TARGETS["quality"])
    yield (
        "Quality is not measured here. The order is by what is lost of the weights: nothing in 16 and 32 bits, then 8 "
        "bits, 4 bits, and the same with zeros; each by time."
    )
    faster = [p for p in predictions if best.ms_per_token / p.ms_per_token >= WORTH]
    if not faster:
        yield f"{best.name} loses least, and nothing is clearly faster: leave the model as it is."
        return
    second = min(faster, key=TARGETS["quality"])
    yield (
        f"{best.name} loses least. {second.name} loses least of what is clearly faster: it needs "
        f"{second.ms_per_token / best.ms_per_token:.2f} times the time. What that costs in quality, `evaluate` tells."
    )


def _of_cost(predictions: Sequence[Prediction], target: str) -> Iterator[str]:
    key = TARGETS[target]
    what = "bytes" if target == "bytes" else "time"
    kinds = {
        name: min((p for p in predictions if (p.pruned, p.bits is not None) == kind), key=key, default=None)
        for name, kind in {
            "dense": (False, False),
            "quantised": (False, True),
            "pruned": (True, False),
            "both": (True, True),
        }.items()
    }
    dense, quantised = kinds["dense"], kinds["quantised"]
    best = min((p for p in (kinds["pruned"], kinds["both"]) if p is not None), key=key, default=None)
    rival = min((p for p in (dense, quantised) if p is not None), key=key, default=None)
    if best is None or rival is None:
        return
    if key(rival) / key(best) >= WORTH:
        yield (
            f"Pruning pays here: {best.name} needs {key(best) / key(rival):.2f} times the {what} of {rival.name}, the "
            "best without zeros. What it costs in quality, `evaluate` tells."
        )
    elif dense is not None and quantised is not None and key(dense) / key(quantised) >= WORTH:
        yield (
            f"Just quantise: {quantised.name} needs {key(quantised) / key(dense):.2f} times the {what} of "
            f"{dense.name}. The best with zeros, {best.name}, needs {key(best) / key(dense):.2f} times, at a price in "
            "quality."
        )
    else:
        smallest = min(predictions, key=key)
        yield (
            f"Leave the model as it is: nothing needs clearly less {what} than {rival.name}; {smallest.name} needs "
            f"{key(smallest) / key(rival):.2f} times as much."
        )
