"""The gates of a recipe: conditions on what was measured. `GATES` is the only list of them.

A gate is called after the figure that it limits, with `max_` or `min_` before: see `runs.figures`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from gblm_compress.settings.fields import Memory, Settings

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One entry of `GATES`.

    Attributes:
        help: what is limited.
        needs: the section of a recipe that measures it, "tasks" for `evaluate.tasks`; None where nothing must be asked.
        unit: of the figure: "bytes", "ms", "%" of a fraction, "×" of a ratio; none for a plain number.
        kind: the type of the limit.
    """

    help: str
    needs: Literal["evaluate", "tasks", "benchmark"] | None
    unit: str = ""
    kind: Any = Positive


GATES: dict[str, Gate] = {
    "max_perplexity": Gate(help="Largest perplexity.", needs="evaluate"),
    "max_perplexity_increase": Gate(
        help="Largest increase of perplexity over dense, as a fraction: 0.15 allows 15 %.",
        needs="evaluate",
        unit="%",
        kind=Annotated[float, Field(ge=0)],
    ),
    "min_retained": Gate(
        help="Share of the dense model's metric that is kept, of those of which more is better: Spearman's correlation "
        "of embeddings, accuracy.",
        needs="evaluate",
        unit="×",
    ),
    "max_mean_kl": Gate(
        help="Largest mean KL divergence from dense, in nats per token.",
        needs="evaluate",
        kind=Annotated[float, Field(ge=0)],
    ),
    "min_top1_agreement": Gate(
        help="Least agreement with dense on the most probable token, as a fraction of tokens.",
        needs="evaluate",
        unit="%",
        kind=Share,
    ),
    "min_task_accuracy": Gate(help="Least mean accuracy on the zero-shot tasks.", needs="tasks", unit="%", kind=Share),
    "min_task_recovery": Gate(help="Least mean accuracy on the tasks over that of dense.", needs="tasks", unit="×"),
    "max_bytes": Gate(help="Most bytes on disk, for example 300MB.", needs=None, unit="bytes", kind=Memory),
    "max_bytes_ratio": Gate(help="Most bytes on disk over those of the dense model.", needs=None, unit="×"),
    "max_memory": Gate(help="Most peak memory while it is timed.", needs="benchmark", unit="bytes", kind=Memory),
    "max_ttft_ms": Gate(help="Longest time to the first token, in milliseconds.", needs="benchmark", unit="ms"),
    "max_tpot_ms": Gate(help="Longest time per token after it, in milliseconds.", needs="benchmark", unit="ms"),
    "min_tokens_per_second": Gate(help="Fewest generated tokens per second, of all sequences.", needs="benchmark"),
    "min_samples_per_second": Gate(help="Fewest samples per second of forward pass.", needs="benchmark"),
    "min_decode_speedup": Gate(help="Least TPOT of dense over TPOT.", needs="benchmark", unit="×"),
    "min_prefill_speedup": Gate(help="Least TTFT of dense over TTFT.", needs="benchmark", unit="×"),
}  # fmt: skip
"""{name: gate}."""


class _Gates(Settings):
    """What must hold for the run to succeed; an unset gate is not checked. Where a figure has an interval, its worse
    end must reach the limit: the 90th percentile of a time, the lower end of a speed-up or an accuracy. A gate on
    quality is on every artefact that is evaluated. One on bytes, memory or speed is on the best artefact, at every
    batch size; a speed-up must then be significant.
    """

    artefact: str | None = Field(
        None,
        description="Which one the gates are on, by the name of its folder: pruned, bitmask, onnx, …; if unset, every "
        "one for quality, the best one for the rest.",
    )

    @property
    def limits(self) -> dict[str, float]:
        """The gates that are set."""
        return {name: limit for name in GATES if (limit := getattr(self, name)) is not None}


if TYPE_CHECKING:  # a type checker cannot read a registry

    class GateSettings(_Gates):
        """See `_Gates`."""

else:
    _FIELDS = {name: (gate.kind | None, Field(None, description=gate.help)) for name, gate in GATES.items()}
    GateSettings = create_model("GateSettings", __base__=_Gates, __doc__=_Gates.__doc__, **_FIELDS)
