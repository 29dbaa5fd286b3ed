"""A whole run, its grid of methods and its gates."""

from collections.abc import Collection
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from gblm_compress.methods.allocation import ALLOCATIONS
from gblm_compress.methods.fits import FITS, PRESETS
from gblm_compress.methods.quantisation import QUANTISERS
from gblm_compress.methods.refinement import REFINEMENTS
from gblm_compress.methods.saliency import METHODS
from gblm_compress.methods.updates import UPDATES
from gblm_compress.settings.fields import MANY, PatternName, Settings
from gblm_compress.settings.prune import PruneSettings
from gblm_compress.settings.recover import RecoverSettings
from gblm_compress.settings.stages import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    ResourceSettings,
)
from gblm_compress.suggestions import synonyms_of


class CompareSettings(Settings):
    """A grid of methods, patterns and seeds, all calibrated and evaluated alike."""

    methods: tuple[str, ...] = Field(
        ("paper", "sparsegpt", "gblm", "wanda", "obs"),
        min_length=1,
        max_length=100,
        description="Each a preset or a method, and what else is chosen: paper, gblm (with the default fit), "
        "gblm+none, obs+best, wanda+swap+least-squares, gblm+owl, wanda+int4, …",
    )
    patterns: tuple[PatternName, ...] = Field(
        ("2:4", "unstructured"), min_length=1, max_length=100, description="As prune.pattern."
    )
    seeds: int = Field(3, ge=1, le=MANY, description="How many draws of the calibration text.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for method in self.methods:
            for pattern in self.patterns:
                try:
                    self.prune_settings(method, pattern)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"method {method!r} with pattern {pattern!r}: {reason}") from error
        return self

    @staticmethod
    def prune_settings(method: str, pattern: str) -> PruneSettings:
        """The settings that an entry of `methods` stands for."""
        first, *rest = method.split("+")
        if first not in (*PRESETS, *METHODS):
            known = ", ".join((*PRESETS, *METHODS))
            if as_here := synonyms_of(METHODS).find(first):
                known += f"; {first} is here {as_here}"
            elif first in (*FITS, *UPDATES, *REFINEMENTS, *ALLOCATIONS, *QUANTISERS):
                known += f"; {first} follows one of them, for example wanda+{first}"
            raise ValueError(f"method {method!r}: {first!r} is neither a preset nor a method; there are {known}")
        values: dict[str, Any] = {"pattern": pattern, ("preset" if first in PRESETS else "method"): first}
        parts: dict[str, Collection[str]] = {
            "fit": FITS,
            "update": UPDATES,
            "refine": REFINEMENTS,
            "allocation": ALLOCATIONS,
            "quantise": QUANTISERS,
        }
        for part in rest:
            key = next((key for key, names in parts.items() if part in names), None)
            if key is None:
                raise ValueError(
                    f"method {method!r}: {part!r} is no fit, update, refinement, allocation or grid, or the second of "
                    "its kind; give for example wanda+swap+least-squares"
                )
            values[key] = part
            for taken in ("fit", "update") if key in ("fit", "update") else (key,):
                del parts[taken]
        return PruneSettings(**values)


class GateSettings(Settings):
    """What must hold for the run to succeed; an unset gate is not checked."""

    max_perplexity_increase: float | None = Field(
        None, ge=0, description="Largest increase of perplexity over dense, as a fraction: 0.15 allows 15 %."
    )
    min_retained: float | None = Field(
        None,
        ge=0,
        description="Share of the dense model's metric that is kept, of those of which more is better: Spearman's "
        "correlation of embeddings, accuracy.",
    )
    min_decode_speedup: float | None = Field(
        None,
        gt=0,
        description="Dense TPOT over TPOT, the lower end of its interval, at every batch size: of the artefact, or of "
        "the best one, whose speed-up must be significant.",
    )
    min_prefill_speedup: float | None = Field(None, gt=0, description="Dense TTFT over TTFT, as min_decode_speedup.")
    artefact: str | None = Field(
        None,
        description="Which one the gates on speed are on, by the name of its folder: pruned, bitmask, onnx, …; the "
        "best one if unset.",
    )
    max_mean_kl: float | None = Field(None, ge=0, description="Mean KL divergence from dense, in nats per token.")
    min_top1_agreement: float | None = Field(None, ge=0, le=1, description="With dense, as a fraction of tokens.")


class Recipe(Settings):
    """A whole run: prune, export, evaluate, benchmark, and what must hold at the end."""

    model: ModelSettings = Field(description="The dense model; a plain string is its source.")
    calibration: CalibrationSettings = Field(
        default_factory=CalibrationSettings, description="Text for the statistics."
    )
    prune: PruneSettings = Field(default_factory=PruneSettings, description="The pruning itself.")
    recover: RecoverSettings | None = Field(
        None, description="Training of the pruned model; the trained one is then exported and measured."
    )
    resources: ResourceSettings = Field(
        default_factory=ResourceSettings, description="Memory for pruning; does not affect the result."
    )
    export: tuple[ExportSettings, ...] = Field((), description="Formats to write, one after the other.")
    evaluate: EvaluateSettings | None = Field(None, description="Perplexity and fidelity; skipped if unset.")
    benchmark: BenchmarkSettings | None = Field(None, description="Latency and memory; skipped if unset.")
    compare: CompareSettings | None = Field(
        None, description="A grid of methods beside the one of 'prune', evaluated as 'evaluate' says; skipped if unset."
    )
    gates: GateSettings = Field(
        default_factory=GateSettings, description="Conditions; a failed one has its own exit code."
    )

    @field_validator("model", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Self:
        gates = self.gates
        of_evaluation = (
            gates.max_perplexity_increase, gates.min_retained, gates.max_mean_kl, gates.min_top1_agreement
        )  # fmt: skip
        if self.evaluate is None and any(gate is not None for gate in of_evaluation):
            raise ValueError("a gate on perplexity, another metric, KL or agreement needs an 'evaluate' section")
        if self.evaluate is None and self.compare is not None:
            raise ValueError("'compare' needs an 'evaluate' section, which says what its models are evaluated on")
        if self.benchmark is None and (gates.min_decode_speedup or gates.min_prefill_speedup):
            raise ValueError("a gate on speed needs a 'benchmark' section")
        artefacts = ["recovered" if self.recover else "pruned", *(export.folder_name for export in self.export)]
        if gates.artefact not in (None, *artefacts):
            raise ValueError(
                f"gates.artefact {gates.artefact!r} is none of what the recipe makes: {', '.join(artefacts)}"
            )
        allowances = [limit for limit in (gates.min_decode_speedup, gates.min_prefill_speedup) if limit is not None]
        if gates.artefact is None and any(limit < 1 for limit in allowances):
            raise ValueError("a gate on speed below 1 allows a slow-down: say of which artefact, with gates.artefact")
        if gates.artefact is not None and not allowances:
            raise ValueError("gates.artefact would do nothing: it is read with a gate on speed")
        if len(set(self.export)) < len(self.export):
            raise ValueError("the same export is listed twice")
        return self
