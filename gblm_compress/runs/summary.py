"""What a report says of models, of pruned layers and of a recovery, from the results of a run's stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from gblm_compress.measure.timings import Measurement
from gblm_compress.measure.zero_shot import ZeroShot
from gblm_compress.models.source import ModelSource


@dataclass(frozen=True)
class Quality:
    """A metric of a model's task.

    Attributes:
        value: the measurement; None where it is not finite.
        error: its standard error.
        dense: the same of the dense model.
    """

    value: float | None
    error: float | None
    dense: float | None


@dataclass(frozen=True)
class ModelSummary:
    """One model in one runtime at one batch size.

    Attributes:
        dense: whether it is a baseline.
        metrics: by name, the one that counts first; empty where it was not evaluated.
        fidelity: how close its predictions are to the dense model's, by name.
        tasks: zero-shot tasks, where any were asked.
        nonzero_fraction: of the weights in the pruned layers.
        timing: None where it was not timed.
    """

    model: str
    dense: bool
    runtime: str
    dtype: str | None
    batch: int | None
    metrics: dict[str, Quality]
    fidelity: dict[str, float | None]
    tasks: ZeroShot | None
    nonzero_fraction: float
    bytes_on_disk: Annotated[int, Field(gt=0)]
    timing: Measurement | None

    @property
    def where(self) -> str:
        """Runtime and batch in words."""
        return self.runtime if self.batch is None else f"{self.runtime}, batch {self.batch}"


@dataclass(frozen=True)
class LayerSummary:
    """What pruning left of a layer.

    Attributes:
        block: its number in the model; None for a layer outside the blocks.
        projection: what it is called in its block.
        output_error: how far its output was from that of its dense weights when it was pruned, as a share of it; None
            where that was not measured.
    """

    name: str
    block: int | None
    projection: str
    pattern: str
    weights: Annotated[int, Field(gt=0)]
    nonzeros: int
    output_error: float | None = None


@dataclass(frozen=True)
class RecoveryLook:
    """One look at held-out text while a pruned model was trained.

    Attributes:
        tokens: trained on before.
        held_out: mean loss of predictions over held-out windows, in nats per token: KL(dense ‖ student), mixed with the
            cross-entropy of the text as in the training.
        moved: share of the first mask's survivors that is gone.
        kept: whether the weights of this look are the outcome.
    """

    tokens: int
    held_out: float
    moved: float
    kept: bool


def summarise(
    dense: ModelSource,
    pruned: ModelSource,
    exports: list[ModelSource],
    baselines: list[ModelSource],
    prune_result: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
    measurements: list[dict[str, Any]],
) -> list[ModelSummary]:
    """A summary of every model and export at each batch size; dense first within a runtime."""
    density = prune_result["nonzeros"] / prune_result["weights"]
    result = []
    ordered = [dense, pruned] + [b for b in baselines if b.is_onnx] + exports
    for source in sorted(ordered, key=lambda s: (_runtime(s) != "torch", _runtime(s))):
        is_dense = source in baselines
        evaluation = evaluations.get(source.name)
        metrics = _metrics(evaluation)
        if source is dense and evaluations:
            of_dense = _metrics(next(iter(evaluations.values())))
            metrics = {name: Quality(metric.dense, None, None) for name, metric in of_dense.items()}
        timed: list[Any] = [m for m in measurements if m["model"] == source.name] or [None]
        for m in timed:
            result.append(
                ModelSummary(
                    model="dense" if source is dense else source.name,
                    dense=is_dense,
                    runtime=m["runtime"] if m else _runtime(source),
                    dtype=m and m["dtype"],
                    batch=m and m["batch"],
                    metrics=metrics,
                    fidelity=(evaluation["fidelity"] or {}) if evaluation else {},
                    tasks=TypeAdapter(ZeroShot | None).validate_python(evaluation and evaluation["zero_shot"]),
                    nonzero_fraction=1.0 if is_dense else density,
                    bytes_on_disk=source.bytes_on_disk,
                    timing=TypeAdapter(Measurement | None).validate_python(m),
                )
            )
    return result


def layers_of(layers: Mapping[str, Mapping[str, Any]]) -> list[LayerSummary]:
    """The pruned layers of a pruning's result, `{name: LayerResult as plain values}`."""
    found = []
    for name, layer in layers.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = None if number is None else int(parts[number])
        projection = ".".join(parts if number is None else parts[number + 1 :])
        weights = layer["shape"][0] * layer["shape"][1]
        error = layer.get("output_error")
        found.append(LayerSummary(name, block, projection, layer["pattern"], weights, layer["nonzeros"], error))
    return found


def recovery_of(result: Mapping[str, Any] | None) -> list[RecoveryLook]:
    """The looks of a recovery's result as plain values; none without a recovery."""
    if result is None:
        return []
    return [
        RecoveryLook(look["tokens"], look["held_out"], look["moved"], kept=number == result["best"])
        for number, look in enumerate(result["curve"])
    ]


def _metrics(evaluation: dict[str, Any] | None) -> dict[str, Quality]:
    names = evaluation["metrics"] if evaluation else ()
    return {
        name: Quality(evaluation[name], evaluation[f"{name}_error"], evaluation[f"baseline_{name}"])
        for name in names
        if evaluation
    }


def _runtime(source: ModelSource) -> str:
    if source.needs_cuda:
        return "torch (CUDA)"
    return "onnxruntime" if source.is_onnx else "torch"
