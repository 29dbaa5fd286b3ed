"""The settings of every stage: one definition each, used by the command line, the recipes and Python alike.

Field descriptions are the text of `--help`, of `gblm-compress schema` and of the recipe reference. Importing this
module loads no torch.
"""

import re
from collections.abc import Mapping
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from gblm_compress import suggestions
from gblm_compress.errors import UsageError
from gblm_compress.formats import FORMATS
from gblm_compress.methods.allocation import ALLOCATIONS, Allocation, Budget, Override, allocate
from gblm_compress.methods.choices import Choice, Need, describe, readers
from gblm_compress.methods.fits import FITS, PRESETS, describe_preset
from gblm_compress.methods.patterns import DENSE, N_M, PER_MATRIX, UNSTRUCTURED, Pattern
from gblm_compress.methods.refinement import REFINEMENTS, Refinement
from gblm_compress.methods.saliency import METHODS, Method
from gblm_compress.methods.updates import UPDATES, Update

REGISTRIES: dict[str, Mapping[str, Choice]] = {
    "method": METHODS,
    "refine": REFINEMENTS,
    "update": UPDATES,
    "allocation": ALLOCATIONS,
}
"""{key of `PruneSettings`: what it chooses from}. Entries that are added before this module is imported count."""

if TYPE_CHECKING:  # a type checker cannot read a registry
    MethodName: TypeAlias = str
    RefinementName: TypeAlias = str
    FitName: TypeAlias = str
    UpdateName: TypeAlias = str
    AllocationName: TypeAlias = str
    PresetName: TypeAlias = str
    FormatName: TypeAlias = str
else:
    MethodName = Literal[*METHODS]
    RefinementName = Literal[*REFINEMENTS]
    FitName = Literal[*FITS]
    UpdateName = Literal[*UPDATES]
    AllocationName = Literal[*ALLOCATIONS]
    PresetName = Literal[*PRESETS]
    FormatName = Literal[*FORMATS]
GradientNorm = Literal["l1", "l2"]
AlphaScale = Literal["published", "normalised"]
FitDtype = Literal["float32", "bfloat16"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
RuntimeName = Literal["torch", "onnxruntime"]
PUBLISHED_CALIBRATION = (128, 2048)  # samples and tokens of the GBLM paper, to which its alpha belongs
FITTED = frozenset(("update", "distillation_epochs"))  # what a fit stands for
READ_BY_DISTILLATION = ("distillation_rate", "fit_dtype")
MANY = 10_000_000  # of anything that is counted; what is larger is a mistake, and would end in want of memory
LEAST_MEMORY = 1_000_000  # bytes; what is smaller lacks its unit
MEMORY = r"^[0-9]{7,18}$|^[0-9]{1,9}(\.[0-9]{1,9})? ?[MmGgTt][Ii]?[Bb]$"


def _has_unit(value: Any) -> Any:
    enough = (
        re.fullmatch(MEMORY, value) if isinstance(value, str) else not isinstance(value, int) or value >= LEAST_MEMORY
    )
    if not enough:
        raise ValueError(f"memory {value!r} has no unit, or not one that is known; give for example 4GiB or 4GB")
    return value


Fraction = Annotated[float, Field(gt=0, lt=1)]
# The rule of N < M is no matter of a regular expression: `Pattern` checks all of it, for the settings too.
PatternName = Annotated[
    str,
    Field(json_schema_extra={"pattern": f"^({UNSTRUCTURED}|{PER_MATRIX}|{N_M})$", "examples": ["2:4", UNSTRUCTURED]}),
]
PatternOrDense = Annotated[str, Field(json_schema_extra={"pattern": f"^({DENSE}|{UNSTRUCTURED}|{PER_MATRIX}|{N_M})$"})]
Memory = Annotated[
    ByteSize,
    BeforeValidator(_has_unit),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": MEMORY}, {"type": "integer", "minimum": LEAST_MEMORY}]}),
]


def _budget(pattern: str, sparsity: float | None) -> Budget:
    try:
        parsed = Pattern(pattern)
        return Budget(parsed, parsed.sparsity(sparsity))
    except UsageError as error:
        raise ValueError(str(error)) from error


class Panel(Enum):
    """Where `--help` lists the option of a field; Common where the field names none."""

    COMMON = "Common"
    METHOD = "Method"
    FIT = "Fit"
    RESOURCES = "Resources"


def _readers(key: str) -> str:
    """Who reads a key that not all combinations read, in words; empty for a key that all of them read."""
    distillation = ["distillation_epochs above 0"] if key in READ_BY_DISTILLATION else []
    return ", or ".join(readers(key, REGISTRIES) + distillation)


class Settings(BaseModel):
    """Frozen, and strict about keys: a misspelt one is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Settings):
    """The dense model, and how to compute with it."""

    source: str = Field(description="A hub id, a local folder, a .gguf file, or 'demo'.")
    dtype: Annotated[Dtype, Panel.RESOURCES] = Field(
        "auto",
        description="To compute in; auto is the checkpoint's own on CUDA and float32 on a CPU, where prune computes in "
        "bfloat16 if the checkpoint is and the CPU is faster at it.",
    )
    device: Annotated[str, Panel.RESOURCES] = Field("auto", description="auto, cpu, cuda or cuda:N.")


class CalibrationSettings(Settings):
    """Which text the statistics are measured on."""

    dataset: str = Field("c4", description="wikitext2, c4, a hub dataset, a .txt/.jsonl/.parquet file, or 'demo'.")
    samples: int = Field(128, ge=1, le=MANY, description="Number of windows.")
    sequence_length: int = Field(2048, ge=2, le=MANY, description="Tokens in a window.")
    seed: int = Field(0, description="Random seed for sampling windows.")


class ResourceSettings(Settings):
    """What pruning may use. None of it changes the result."""

    memory: Annotated[Memory | None, Panel.RESOURCES] = Field(
        None,
        description="Memory to plan with, for example 4GiB: a model that does not fit stays on disk, and so do hidden "
        "states; 80 % of what is free if unset.",
    )
    offload: Annotated[bool | None, Panel.RESOURCES] = Field(
        None, description="Keep the model on disk and one block at a time in memory; if unset, where it would not fit."
    )


class OverrideSettings(Settings):
    """An exception for some layers."""

    layers: str = Field(description="Shell-style pattern over full layer names.")
    pattern: PatternOrDense = Field("unstructured", description="As prune.pattern, or dense: left as it is.")
    sparsity: Fraction | None = Field(None, description="As prune.sparsity.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _budget(self.pattern, self.sparsity)
        return self


class PruneSettings(Settings):
    """Everything that decides which weights survive and what they become, apart from the model and the text."""

    preset: PresetName | None = Field(
        None,
        description="A procedure as published; stands for the keys that are not given. "
        + " ".join(f"{name}: {describe_preset(name)}." for name in PRESETS),
    )
    method: MethodName = Field("gblm", description=f"What a weight is worth. {describe(METHODS)}.")
    pattern: PatternName = Field(
        "unstructured",
        description="Which weights compete: unstructured (per output row), unstructured-per-matrix, or N:M "
        "(at most N nonzeros in every M weights along the input).",
    )
    sparsity: Fraction | None = Field(
        None, description="Fraction of zeros, 0.5 by default; N:M fixes it and needs none."
    )
    gradient_norm: Annotated[GradientNorm, Panel.METHOD] = Field(
        "l1", description="How the gradients of several samples combine: l1 or l2."
    )
    alpha: Annotated[float, Panel.METHOD] = Field(
        100.0, ge=0, description=f"Weight of the gradient term, read with {_readers('alpha')}."
    )
    alpha_scale: Annotated[AlphaScale, Panel.METHOD] = Field(
        "published",
        description="published: alpha as it is; normalised: alpha means at any calibration size what it means at the "
        "published 128 samples of 2048 tokens.",
    )
    allocation: Annotated[AllocationName, Panel.METHOD] = Field(
        "uniform", description=f"How much each layer keeps. {describe(ALLOCATIONS)}."
    )
    deviation: Annotated[float, Panel.METHOD] = Field(
        0.08, gt=0, lt=1, description=f"How far a layer's density may move, read with {_readers('deviation')}."
    )
    refine: Annotated[RefinementName, Panel.METHOD] = Field(
        "none", description=f"What happens to the mask. {describe(REFINEMENTS)}."
    )
    fit: FitName | None = Field(
        "balanced",
        description="What is fitted, by the surviving weights, to the dense model; stands for update and "
        f"distillation_epochs. {describe(FITS)}.",
    )
    update: Annotated[UpdateName, Panel.FIT] = Field(
        "reconstruct", description=f"What happens to the survivors, instead of a fit. {describe(UPDATES)}."
    )
    damping: Annotated[float, Panel.FIT] = Field(
        0.01, gt=0, description=f"Damping in shares of the mean input power, read with {_readers('damping')}."
    )
    reconstruction_epochs: Annotated[int, Panel.FIT] = Field(
        3, ge=1, le=MANY, description="Update reconstruct: passes over the samples, at most."
    )
    reconstruction_rounds: Annotated[int, Panel.FIT] = Field(
        1,
        ge=1,
        le=MANY,
        description="Update reconstruct: number of fits. After the first fit, the mask is re-chosen before each fit; "
        "pruned weights are updated too.",
    )
    reconstruction_rate: Annotated[float, Panel.FIT] = Field(
        0.007, gt=0, description="Update reconstruct: Adam's step in shares of a layer's root mean square weight."
    )
    distillation_epochs: Annotated[int, Panel.FIT] = Field(
        0,
        ge=0,
        le=MANY,
        description="Passes over the samples that fit all survivors to the dense model's predictions at the end.",
    )
    distillation_rate: Annotated[float, Panel.FIT] = Field(
        0.0005, gt=0, description="Distillation: Adam's step, as reconstruction_rate."
    )
    fit_dtype: Annotated[FitDtype, Panel.FIT] = Field(
        "bfloat16", description="Dtype of products in reconstruction and distillation; weights are always float32."
    )
    targets: Annotated[tuple[str, ...], Panel.METHOD] = Field(
        ("*",), description="Shell-style patterns of the layers to prune."
    )
    ignore: Annotated[tuple[str, ...], Panel.METHOD] = Field((), description="Patterns of the layers to leave alone.")
    overrides: Annotated[tuple[OverrideSettings, ...], Panel.METHOD] = Field(
        (), description="Exceptions by layer; the last match counts."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = PRESETS.get(values["preset"], {}) if isinstance(values.get("preset"), str) else {}
        if own := FITTED & values.keys():
            preset = {key: value for key, value in preset.items() if key != "fit"}
        values = {**preset, **values}
        fit = values.setdefault("fit", None) if own or FITTED & preset.keys() else values.get("fit")
        return {**FITS[fit].settings, **values} if isinstance(fit, str) and fit in FITS else values

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        if self.fit is not None and (choice := FITS[self.fit]).settings != self.model_dump(include=set(FITTED)):
            if self.update == choice.update and choice.distillation_epochs and self.distillation_epochs:
                return self
            stands = ", ".join(f"{key} {value}" for key, value in choice.settings.items())
            raise ValueError(
                f"fit {self.fit} is {stands}: it cannot be update {self.update} with {self.distillation_epochs} "
                "epochs of distillation; give the fit, or the others without it"
            )
        return self

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        if value == DENSE:
            raise ValueError("pattern 'dense' prunes nothing; it is for the exceptions in 'overrides'")
        try:
            return Pattern(value).name
        except UsageError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _check_sparsity(self) -> Self:
        _budget(self.pattern, self.sparsity)
        return self

    @model_validator(mode="after")
    def _check_all_is_read(self) -> Self:
        preset = PRESETS.get(self.preset or "", {})
        for name, field in type(self).model_fields.items():
            value, where = getattr(self, name), _readers(name)
            if where and name not in self.read and value not in (field.default, preset.get(name)):
                raise ValueError(f"{name} {value} would do nothing: it is read with {where}")
        return self

    @property
    def choices(self) -> tuple[Method, Refinement, Update, Allocation]:
        """The entries of the registries that the names stand for."""
        return METHODS[self.method], REFINEMENTS[self.refine], UPDATES[self.update], ALLOCATIONS[self.allocation]

    @property
    def read(self) -> frozenset[str]:
        """Which of the keys that not all combinations read are read by this one."""
        keys = {key for choice in self.choices for key in choice.keys}
        return frozenset(keys.union(READ_BY_DISTILLATION) if self.distillation_epochs else keys)

    @property
    def block_needs(self) -> Need:
        """What is measured of each block when it is pruned."""
        method, refinement, update, _ = self.choices
        return method.needs | refinement.needs | update.needs

    @property
    def needs(self) -> Need:
        """What is measured at all: of each block, and before, for the allocation."""
        return self.block_needs | ALLOCATIONS[self.allocation].needs

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the dense model are read."""
        return Need.GRADIENTS in self.needs

    @property
    def needs_blocks(self) -> bool:
        """Whether the blocks are run one by one on the text while they are pruned."""
        return bool(self.block_needs & Need.BLOCKS) or self.fits_blocks

    @property
    def needs_text(self) -> bool:
        """Whether the method looks at calibration text at all."""
        return bool(self.needs) or self.needs_blocks or self.distillation_epochs > 0

    @property
    def updates(self) -> bool:
        """Whether survivors change their values."""
        return UPDATES[self.update].moves or self.distillation_epochs > 0

    @property
    def fits_blocks(self) -> bool:
        """Whether the survivors of each block are fitted together to its output."""
        return UPDATES[self.update].fits_block

    def effective_alpha(self, samples: int, sequence_length: float) -> float:
        """The factor of the gradient term for a calibration of this size.

        The activation term of gblm grows with the square root of the tokens in a sample, the gradient term with the
        samples (l1) or their square root (l2). Both terms of regional grow alike: its alpha has no scale.
        """
        if self.alpha_scale == "published":
            return self.alpha
        published_samples, published_length = PUBLISHED_CALIBRATION
        samples_factor = (published_samples / samples) ** (1.0 if self.gradient_norm == "l1" else 0.5)
        return self.alpha * samples_factor * (sequence_length / published_length) ** 0.5

    def budgets(self, names: list[str]) -> dict[str, Budget]:
        """The budget of each named layer.

        Raises:
            UsageError: an override matches none.
        """
        overrides = tuple(Override(o.layers, _budget(o.pattern, o.sparsity)) for o in self.overrides)
        return allocate(names, self.uniform_budget, overrides)

    @property
    def uniform_budget(self) -> Budget:
        """The budget of a layer that no override matches."""
        return _budget(self.pattern, self.sparsity)

    def is_exception(self, name: str) -> bool:
        """Whether an override decides about the layer."""
        return any(fnmatchcase(name, override.layers) for override in self.overrides)


class ExportSettings(Settings):
    """One export."""

    format: FormatName = Field(description=f"What to write. {describe(FORMATS)}.")
    dtype: Dtype = Field("auto", description="Dtype of the exported weights; auto is the checkpoint's own.")
    sparse: bool = Field(False, description="ONNX: store pruned weights packed; ONNX Runtime unpacks them at load.")
    kernels: bool = Field(
        False, description="ONNX: run pruned weights packed, on an operator of this package (CPU, float32)."
    )

    @property
    def folder_name(self) -> str:
        """What the folder of the export is called in a run."""
        options = (name if value is True else f"{name}-{value}" for name, value in self.own.items())
        return "-".join([self.format, *options, *([] if self.dtype == "auto" else [self.dtype])])

    @property
    def own(self) -> dict[str, Any]:
        """The options beside the dtype that differ from their defaults; not all formats read them."""
        return self.model_dump(exclude={"format", "dtype"}, exclude_defaults=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        format = FORMATS[self.format]
        if self.dtype not in ("auto", *format.dtypes):
            raise ValueError(f"{self.format} has no {self.dtype}; give {' or '.join(format.dtypes)}")
        for name in self.own:
            readers = [other for other, entry in FORMATS.items() if name in entry.reads]
            if self.format not in readers:
                raise ValueError(f"{name} would do nothing: it is read with format {' or '.join(readers)}")
        if self.sparse and self.kernels:
            raise ValueError("kernels stores packed weights too; choose sparse or kernels")
        if self.kernels and self.dtype not in ("auto", "float32"):
            raise ValueError("kernels runs in float32; give that dtype")
        return self


class EvaluateSettings(Settings):
    """What to evaluate on."""

    dataset: str = Field("wikitext2", description="As calibration.dataset; the part meant for evaluation is read.")
    sequence_length: int = Field(2048, ge=2, le=MANY, description="Tokens in a window of the evaluation.")
    max_windows: int | None = Field(
        None, ge=1, le=MANY, description="At most this many windows, from the start; all if unset."
    )
    tasks: tuple[str, ...] = Field((), description="Zero-shot tasks of lm-eval, for example arc_easy, piqa.")
    limit: int | None = Field(None, ge=1, le=MANY, description="At most this many questions of a task; all if unset.")
    include_path: str | None = Field(None, description="A folder with lm-eval task files of your own.")


class CompareSettings(Settings):
    """A grid of methods, patterns and seeds, all calibrated and evaluated alike."""

    methods: tuple[str, ...] = Field(
        ("paper", "sparsegpt", "gblm", "wanda", "obs"),
        min_length=1,
        max_length=100,
        description="Each a preset or a method, and what else is chosen: paper, gblm (with the default fit), "
        "gblm+none, obs+best, wanda+swap+least-squares, gblm+owl, …",
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
            if as_here := suggestions.ELSEWHERE.get(suggestions.plain(first)):
                known += f"; {first} is here {'+'.join(as_here.values())}"
            elif first in (*FITS, *UPDATES, *REFINEMENTS, *ALLOCATIONS):
                known += f"; {first} follows one of them, for example wanda+{first}"
            raise ValueError(f"method {method!r}: {first!r} is neither a preset nor a method; there are {known}")
        values: dict[str, Any] = {"pattern": pattern, ("preset" if first in PRESETS else "method"): first}
        parts: dict[str, Mapping[str, Choice]] = {
            "fit": FITS,
            "update": UPDATES,
            "refine": REFINEMENTS,
            "allocation": ALLOCATIONS,
        }
        for part in rest:
            key = next((key for key, known_parts in parts.items() if part in known_parts), None)
            if key is None:
                raise ValueError(
                    f"method {method!r}: {part!r} is no fit, update, refinement or allocation, or the second of its "
                    "kind; give for example wanda+swap+least-squares"
                )
            values[key] = part
            del parts[key]
            if key in ("fit", "update"):
                parts.pop("fit", None)
                parts.pop("update", None)
        return PruneSettings(**values)


class BenchmarkSettings(Settings):
    """What to time."""

    batch: tuple[Annotated[int, Field(ge=1, le=MANY)], ...] = Field((1,), min_length=1, description="Batch sizes.")
    prompt: int = Field(128, ge=1, le=MANY, description="Tokens in a prompt.")
    generate: int = Field(32, ge=2, le=MANY, description="Tokens to generate; the prefill gives the first.")
    repeats: int = Field(7, ge=5, le=MANY, description="Counted rounds.")
    warmup: int = Field(2, ge=0, le=MANY, description="Rounds before them, dropped.")
    runtimes: tuple[RuntimeName, ...] = Field(
        ("torch", "onnxruntime"), min_length=1, description="Whose models are timed."
    )
    threads: Annotated[int | None, Panel.RESOURCES] = Field(
        None, ge=1, le=1024, description="Intra-op threads on the CPU; as many as torch takes if unset."
    )


class GateSettings(Settings):
    """What must hold for the run to succeed; an unset gate is not checked."""

    max_perplexity_increase: float | None = Field(
        None, ge=0, description="Largest increase of perplexity over dense, as a fraction: 0.15 allows 15 %."
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
        of_evaluation = (gates.max_perplexity_increase, gates.max_mean_kl, gates.min_top1_agreement)
        if self.evaluate is None and any(gate is not None for gate in of_evaluation):
            raise ValueError("a gate on perplexity, KL or agreement needs an 'evaluate' section")
        if self.evaluate is None and self.compare is not None:
            raise ValueError("'compare' needs an 'evaluate' section, which says what its models are evaluated on")
        if self.benchmark is None and (gates.min_decode_speedup or gates.min_prefill_speedup):
            raise ValueError("a gate on speed needs a 'benchmark' section")
        artefacts = ["pruned", *(export.folder_name for export in self.export)]
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
