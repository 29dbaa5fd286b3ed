"""Settings of a whole run, its gates, and a comparison of methods."""

from collections.abc import Collection, Iterator
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from gblm_compress.formats import FORMATS, Format
from gblm_compress.methods.allocation import ALLOCATIONS
from gblm_compress.methods.fits import FITS
from gblm_compress.methods.quantisation import QUANTISERS
from gblm_compress.methods.saliency import METHODS
from gblm_compress.settings.fields import WHERE_ZEROS_GO, Count, Memory, OneOf, PatternName, Settings
from gblm_compress.settings.prune import PRESETS, PruneSettings
from gblm_compress.settings.stages import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    RecoverSettings,
    ResourceSettings,
)

Above0 = Annotated[float | None, Field(gt=0)]
AtLeast0 = Annotated[float | None, Field(ge=0)]
Share = Annotated[float | None, Field(ge=0, le=1)]
_DIFFERENT = Field(min_length=1, max_length=100, json_schema_extra={"uniqueItems": True})
Fault = tuple[tuple[str | int, ...], str]
"""The place of a fault, and the fault in words."""


def _limit(help: str) -> Any:
    return Field(None, description=help)


class GateSettings(Settings):
    """Limits that a run must meet; an unset gate is not checked. If a figure has an interval, its worse end must meet
    the limit: the 90th percentile of a time, the lower end of a speed-up or an accuracy. Gates on quality apply to
    every evaluated artefact. Gates on bytes, memory or speed apply to the best artefact, at every batch size; a
    speed-up must then be significant.
    """

    artefact: str | None = Field(
        None,
        description="Artefact to check, by the name of its folder: pruned, bitmask, onnx, … If unset: every artefact "
        "for quality, the best one for the rest.",
    )
    max_perplexity: Annotated[Above0, "evaluate"] = _limit("Largest perplexity.")
    max_perplexity_increase: Annotated[AtLeast0, "evaluate"] = _limit(
        "Largest increase of perplexity over dense, as a fraction: 0.15 allows 15 %."
    )
    min_retained: Annotated[Above0, "evaluate"] = _limit(
        "Least share of the dense model's metric, if more is better: Spearman's correlation or accuracy."
    )
    max_mean_kl: Annotated[AtLeast0, "evaluate"] = _limit("Largest mean KL divergence from dense, in nats per token.")
    min_top1_agreement: Annotated[Share, "evaluate"] = _limit(
        "Least agreement with dense on the most probable token, as a fraction of tokens."
    )
    min_task_accuracy: Annotated[Share, "tasks"] = _limit("Least mean accuracy on the zero-shot tasks.")
    min_task_recovery: Annotated[Above0, "tasks"] = _limit("Least mean accuracy on the tasks, relative to dense.")
    max_bytes: Annotated[Memory | None, "files"] = _limit("Most bytes on disk, for example 300MB.")
    max_bytes_ratio: Annotated[Above0, "files"] = _limit("Most bytes on disk, relative to dense.")
    max_memory: Annotated[Memory | None, "benchmark"] = _limit("Largest peak memory in the benchmark.")
    max_ttft_ms: Annotated[Above0, "benchmark"] = _limit("Longest time to the first token, in milliseconds.")
    max_tpot_ms: Annotated[Above0, "benchmark"] = _limit("Longest time per further token, in milliseconds.")
    min_tokens_per_second: Annotated[Above0, "benchmark"] = _limit(
        "Fewest generated tokens per second, over all sequences."
    )
    min_samples_per_second: Annotated[Above0, "benchmark"] = _limit("Fewest samples per second in forward passes.")
    min_decode_speedup: Annotated[Above0, "benchmark"] = _limit("Least speed-up of a token: dense TPOT / TPOT.")
    min_prefill_speedup: Annotated[Above0, "benchmark"] = _limit("Least speed-up of a prompt: dense TTFT / TTFT.")

    @property
    def limits(self) -> dict[str, float]:
        return {name: limit for name in GATES if (limit := getattr(self, name)) is not None}


GATES: dict[str, str] = {
    name: field.metadata[-1] for name, field in GateSettings.model_fields.items() if field.metadata
}
"""{`max_` or `min_` and a figure of `runs.rows`: its source, a section of a recipe, its tasks, or the files}"""


class CompareSettings(Settings):
    """A grid of methods, patterns and seeds, with the same calibration and evaluation."""

    methods: Annotated[tuple[str, ...], _DIFFERENT] = Field(
        ("paper", "sparsegpt", "gblm", "wanda", "obs"),
        description="Presets and methods. A fit, an allocation and a grid may follow a method: paper, gblm (with the "
        "default fit), gblm+none, obs+best, gblm+sensitivity, wanda+fast+int4, …",
    )
    patterns: Annotated[tuple[PatternName, ...], _DIFFERENT] = Field(
        ("2:4", "unstructured"), description=f"Patterns to compare: {WHERE_ZEROS_GO}."
    )
    seeds: Count = Field(3, description="Number of random draws of the calibration text.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("methods", self.methods), ("patterns", self.patterns)):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{name} has {', '.join(map(repr, twice))} twice")
        for method in self.methods:
            for pattern in self.patterns:
                try:
                    self.prune_settings(method, pattern)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"method {method!r} with pattern {pattern!r}: {reason}") from error
        return self

    @staticmethod
    @cache
    def prune_settings(method: str, pattern: str) -> PruneSettings:
        first, *rest = method.split("+")
        if first not in (*PRESETS, *METHODS):
            known = ", ".join((*PRESETS, *METHODS))
            if first in (*FITS, *ALLOCATIONS, *QUANTISERS):
                known += f"; {first} follows one of them, for example wanda+{first}"
            elif close := OneOf.of(PRESETS | METHODS).closest(first):
                known += f"; did you mean {close!r}?"
            raise ValueError(f"method {method!r}: {first!r} is neither a preset nor a method; choose from {known}")
        values: dict[str, Any] = {"pattern": pattern, ("preset" if first in PRESETS else "method"): first}
        parts: dict[str, Collection[str]] = {"fit": FITS, "allocation": ALLOCATIONS, "quantise": QUANTISERS}
        for part in rest:
            key = next((key for key, names in parts.items() if part in names), None)
            if key is None:
                raise ValueError(
                    f"method {method!r}: {part!r} is not a fit, allocation or grid, or is the second of its kind; "
                    "give for example wanda+fast+int4"
                )
            values[key] = part
            del parts[key]
        return PruneSettings(**values)


class Recipe(Settings):
    """A whole run: prune, recover, export, evaluate, benchmark, and check gates."""

    model: Annotated[
        ModelSettings, BeforeValidator(lambda given: {"source": given} if isinstance(given, str) else given)
    ] = Field(description="The dense model; a plain string is its source.")
    calibration: CalibrationSettings = Field(
        default_factory=CalibrationSettings, description="Data that pruning measures on."
    )
    prune: PruneSettings | None = Field(
        default_factory=PruneSettings,
        description="The pruning itself; null leaves it out, and exports the dense model as it is.",
    )
    recover: RecoverSettings | None = Field(
        None, description="Training of the pruned model; the trained one is then exported and measured."
    )
    resources: ResourceSettings = Field(
        default_factory=ResourceSettings, description="Memory for pruning; does not affect the result."
    )
    export: tuple[ExportSettings, ...] = Field((), description="Formats to write, one after the other.")
    evaluate: EvaluateSettings | None = Field(None, description="Perplexity and fidelity; skipped if unset.")
    benchmark: BenchmarkSettings | None = Field(None, description="Latency and memory; skipped if unset.")
    gates: Annotated[
        tuple[GateSettings, ...],
        BeforeValidator(lambda given: (given,) if isinstance(given, dict | GateSettings) else given),
    ] = Field(
        (),
        description="Limits; a run that misses one ends with exit code 6. A mapping, or a sequence of mappings for "
        "several artefacts.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if faults := [*self._faults()]:
            listed: Any = [
                {"type": "value_error", "loc": where, "input": None, "ctx": {"error": said}} for where, said in faults
            ]
            raise ValidationError.from_exception_data(type(self).__name__, listed)
        return self

    def _faults(self) -> Iterator[Fault]:
        """Contradictions between sections."""
        if len(set(self.export)) < len(self.export):
            yield ("export",), "the same export is listed twice"
        if self.prune is None:
            yield from self._faults_without_pruning()
        for number, gates in enumerate(self.gates):
            for key, said in self._faults_of_gates(gates):
                yield ("gates", number, key), said

    def _faults_without_pruning(self) -> Iterator[Fault]:
        unpruned = "needs a pruned model, but prune is null; leave it out, or prune"
        if self.recover:
            yield ("recover",), unpruned
        if not self.export:
            yield ("prune",), "null without an export leaves nothing to do; list one in 'export'"
        for number, export in enumerate(self.export):
            asked = {"format": FORMATS[export.format].needs_zeros, "kernels": export.kernels}
            for key in (key for key, is_asked in asked.items() if is_asked):
                yield ("export", number, key), f"{export.format if key == 'format' else key} {unpruned}"
        in_torch = any(format.runtime == "torch" for format in self._made.values())
        if self.evaluate and self.evaluate.tasks and not in_torch:
            yield ("evaluate", "tasks"), "tasks run in torch only, but no export does; leave them out"
        if self.benchmark and self.benchmark.float_baseline is False:
            yield ("benchmark", "float_baseline"), "false needs a pruned model, but prune is null; leave it out"

    @property
    def _made(self) -> dict[str, Format]:
        return {export.folder_name: FORMATS[export.format] for export in self.export}

    def _faults_of_gates(self, gates: GateSettings) -> Iterator[tuple[str, str]]:
        sections = {
            "evaluate": (self.evaluate, "an 'evaluate' section"),
            "tasks": (self.evaluate and self.evaluate.tasks, "an 'evaluate' section with tasks"),
            "benchmark": (self.benchmark, "a 'benchmark' section"),
        }
        folders = () if self.prune is None else ("recovered",) if self.recover else ("pruned",)
        if gates.artefact not in (None, *folders, *self._made):
            made = ", ".join((*folders, *self._made))
            yield "artefact", f"{gates.artefact!r} is not an artefact of the recipe, which makes {made or 'none'}"
        if gates.artefact and not gates.limits:
            yield "artefact", "would do nothing without a gate"
        for name, limit in gates.limits.items():
            given, section = sections.get(GATES[name], (True, ""))
            if not given:
                yield name, f"needs {section}"
            if gates.artefact is None and name.endswith("speedup") and limit < 1:
                yield name, "below 1 allows a slow-down; name its artefact in gates.artefact"
            made_as = self._made.get(gates.artefact or "")
            if GATES[name] == "tasks" and made_as and made_as.runtime != "torch":
                yield name, f"tasks run in torch only, but {gates.artefact} does not"
