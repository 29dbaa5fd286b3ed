"""What decides which weights survive and what they become."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, field_validator, model_validator

from gblm_compress.errors import UsageError
from gblm_compress.methods.allocation import ALLOCATIONS, Allocation, Budget, Override, allocate
from gblm_compress.methods.choices import Choice, Need, describe, readers
from gblm_compress.methods.fits import FITS, PRESETS, describe_preset
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.methods.quantisation import GROUPS, QUANTISERS, ROW, Quantiser, columns_of_a_scale, grid_in_words
from gblm_compress.methods.refinement import REFINEMENTS, Refinement
from gblm_compress.methods.saliency import METHODS, Method
from gblm_compress.methods.updates import UPDATES, Update
from gblm_compress.settings.fields import (
    MANY,
    FitDtype,
    Fraction,
    Panel,
    PatternName,
    PatternOrDense,
    Settings,
    synonyms_of,
)

REGISTRIES: dict[str, Mapping[str, Choice]] = {
    "method": METHODS,
    "refine": REFINEMENTS,
    "update": UPDATES,
    "allocation": ALLOCATIONS,
    "quantise": QUANTISERS,
}
"""{key of `PruneSettings`: what it chooses from}. Entries that are added before this module is imported count."""
if TYPE_CHECKING:  # a type checker cannot read a registry
    MethodName: TypeAlias = str
    RefinementName: TypeAlias = str
    FitName: TypeAlias = str
    UpdateName: TypeAlias = str
    AllocationName: TypeAlias = str
    PresetName: TypeAlias = str
    QuantiserName: TypeAlias = str
    Group: TypeAlias = str | int
else:
    MethodName = Literal[*METHODS]
    RefinementName = Literal[*REFINEMENTS]
    FitName = Literal[*FITS]
    UpdateName = Literal[*UPDATES]
    AllocationName = Literal[*ALLOCATIONS]
    PresetName = Literal[*PRESETS]
    QuantiserName = Literal[*QUANTISERS]
    Group = Literal[ROW, *GROUPS]
GradientNorm = Literal["l1", "l2"]
AlphaScale = Literal["published", "normalised"]
PUBLISHED_CALIBRATION = (128, 2048)  # samples and tokens of the GBLM paper, to which its alpha belongs
FITTED = frozenset(("update", "distillation_epochs"))  # what a fit stands for
READ_BY_DISTILLATION = ("distillation_rate", "fit_dtype")


def _number(value: Any) -> Any:
    """A number that was given as text, as on the command line."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _group_defaults() -> str:
    return ", ".join(f"{q.group or ROW} with {name}" for name, q in QUANTISERS.items() if q.make is not None)


def _budget(pattern: str, sparsity: float | None) -> Budget:
    try:
        parsed = Pattern(pattern)
        return Budget(parsed, parsed.sparsity(sparsity))
    except UsageError as error:
        raise ValueError(str(error)) from error


def _readers(key: str) -> str:
    """Who reads a key that not all combinations read, in words; empty for a key that all of them read."""
    distillation = ["distillation_epochs above 0"] if key in READ_BY_DISTILLATION else []
    return ", or ".join(readers(key, REGISTRIES) + distillation)


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
    method: Annotated[MethodName, synonyms_of(METHODS)] = Field(
        "gblm", description=f"What a weight is worth. {describe(METHODS)}."
    )
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
        description="What the surviving weights are fitted to; stands for update and "
        f"distillation_epochs. {describe(FITS)}.",
    )
    update: Annotated[UpdateName, Panel.FIT] = Field(
        "reconstruct", description=f"What happens to the survivors, instead of a fit. {describe(UPDATES)}."
    )
    quantise: QuantiserName = Field(
        "none",
        description="Grid of the surviving weights, on which they are fitted and stored. " + f"{describe(QUANTISERS)}.",
    )
    group: Annotated[Group | None, BeforeValidator(_number), Panel.FIT] = Field(
        None,
        description=f"Weights of a row that share a scale, read with {_readers('group')}: row, or so many neighbouring "
        f"columns; by default {_group_defaults()}.",
    )
    damping: Annotated[float, Panel.FIT] = Field(
        0.01, gt=0, description=f"Damping in shares of the mean input power, read with {_readers('damping')}."
    )
    guidance: Annotated[float, Panel.FIT] = Field(
        0.0,
        ge=0,
        le=1,
        description="How much those tokens count in Gram matrices that the loss feels: the power of the squared "
        f"gradient of what a layer gives for them; 0: all count alike. Read with {_readers('guidance')}.",
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
        "auto",
        description="Dtype of products in reconstruction and distillation; weights are always float32. float32 leaves "
        "products in --dtype. auto: the one that the machine multiplies faster in.",
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
        if "fit" in preset:
            preset = FITS[preset["fit"]].settings | preset
        # A fit replaces what it stands for in the preset, and the other way round.
        replaced = {"fit"} if FITTED & values.keys() else FITTED if values.get("fit") is not None else set()
        values = {key: value for key, value in preset.items() if key not in replaced} | values
        if FITTED & values.keys():
            values.setdefault("fit", None)
        fit = values.get("fit")
        return FITS[fit].settings | values if isinstance(fit, str) and fit in FITS else values

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
    def choices(self) -> tuple[Method, Refinement, Update, Quantiser, Allocation]:
        """The entries of the registries that the names stand for."""
        update, allocation = UPDATES[self.update], ALLOCATIONS[self.allocation]
        return METHODS[self.method], REFINEMENTS[self.refine], update, self.quantiser, allocation

    @property
    def quantiser(self) -> Quantiser:
        """What the surviving weights are rounded by."""
        return QUANTISERS[self.quantise]

    @property
    def columns_of_a_scale(self) -> int | None:
        """How many columns of a row share a scale; None for all of them."""
        return columns_of_a_scale(self.quantise, self.group)

    @property
    def grid(self) -> str | None:
        """The grid of the survivors in words; None where they are not rounded."""
        return grid_in_words(self.quantise, self.group)

    @property
    def read(self) -> frozenset[str]:
        """Which of the keys that not all combinations read are read by this one."""
        keys = {key for choice in self.choices for key in choice.keys}
        return frozenset(keys.union(READ_BY_DISTILLATION) if self.distillation_epochs else keys)

    @property
    def block_needs(self) -> Need:
        """What is measured of each block when it is pruned."""
        method, refinement, update, quantiser, _ = self.choices
        return method.needs | refinement.needs | update.needs | quantiser.needs

    @property
    def needs(self) -> Need:
        """What is measured at all: of each block, and before, for the allocation."""
        return self.block_needs | ALLOCATIONS[self.allocation].needs

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the dense model's weights are read."""
        return Need.GRADIENTS in self.needs

    @property
    def runs_backward(self) -> bool:
        """Whether the dense model runs backward, for the gradients of its weights or of tokens."""
        return self.needs_gradients or self.guidance > 0

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
