"""The settings of a pruning: method, pattern, allocation, fit and quantiser."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gblm_compress.errors import UsageError
from gblm_compress.methods.allocation import ALLOCATIONS, Allocation, Budget
from gblm_compress.methods.choices import Choice, Need, describe, readers
from gblm_compress.methods.fits import FITS, FitChoice
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.methods.quantisation import GROUPS, QUANTISERS, ROW, Quantiser, columns_of_a_scale, grid_in_words
from gblm_compress.methods.saliency import METHODS, Method
from gblm_compress.settings.fields import (
    SPARSITY,
    WHERE_ZEROS_GO,
    Count,
    Fraction,
    OneOf,
    Panel,
    PatternOrDense,
    Settings,
    budget_of,
)

REGISTRIES: dict[str, Mapping[str, Choice]] = {
    "method": METHODS,
    "fit": FITS,
    "allocation": ALLOCATIONS,
    "quantise": QUANTISERS,
}  # {key of `PruneSettings`: its choices}; entries added before this module is imported count
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"method": "gblm", "gradient_norm": "l1", "alpha": 100.0, "allocation": "uniform", "fit": "none"},
    "sparsegpt": {"method": "obs", "fit": "obs"},
}  # paper is GBLM (arXiv 2311.04902), sparsegpt arXiv 2301.00774

MethodName = Annotated[str, OneOf.of(METHODS)]
FitName = Annotated[str, OneOf.of(FITS)]
AllocationName = Annotated[str, OneOf.of(ALLOCATIONS)]
PresetName = Annotated[str, OneOf.of(PRESETS)]
QuantiserName = Annotated[str, OneOf.of(QUANTISERS)]
Group = Annotated[str | int, OneOf((ROW, *GROUPS))]
GROUP_DEFAULTS = ", ".join(f"{q.group or ROW} with {name}" for name, q in QUANTISERS.items() if q.make is not None)
GradientNorm = Literal["l1", "l2"]


def _number(value: Any) -> Any:
    """Convert a number that was given as text, as on the command line."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _readers(key: str) -> str:
    """The choices that read a key, in words; empty if all combinations read it."""
    return ", or ".join(readers(key, REGISTRIES))


class OverrideSettings(Settings):
    """An exception for some layers."""

    layers: str = Field(description="Shell-style pattern over full layer names.")
    pattern: PatternOrDense = Field(
        "unstructured",
        description="As prune.pattern. Dense layers are only rounded, with quantise, or left as they are.",
    )
    sparsity: Fraction | None = Field(None, description="As prune.sparsity.")

    @property
    def budget(self) -> Budget:
        return budget_of(self.pattern, self.sparsity)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Parse `LAYERS=PATTERN` or `LAYERS=PATTERN@SPARSITY`."""
        if not isinstance(value, str):
            return value
        if not (parts := re.fullmatch(r"([^=]+)=([^@=]+)(?:@(\d*\.?\d+))?", value)):
            raise ValueError(
                f"{value!r} is not of the form LAYERS=PATTERN[@SPARSITY]; give for example '*.down_proj=6:8'"
            )
        layers, pattern, sparsity = parts.groups()
        return {"layers": layers, "pattern": pattern, "sparsity": sparsity and float(sparsity)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        budget_of(self.pattern, self.sparsity)
        return self

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.layers)


class PruneSettings(Settings):
    """All settings of a pruning, apart from the model and the text."""

    preset: Annotated[PresetName | None, Panel.METHOD] = Field(
        None,
        description="A paper's settings; your options override them. "
        + " ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in preset.items())}." for name, preset in PRESETS.items()),
    )
    method: MethodName = Field("gblm", description=f"How weights are ranked. {describe(METHODS)}.")
    pattern: PatternOrDense = Field(
        "unstructured",
        description=f"Where the zeros go: {WHERE_ZEROS_GO}; dense (no zeros) only rounds, with quantise.",
    )
    sparsity: Fraction | None = Field(None, description=SPARSITY)
    gradient_norm: Annotated[GradientNorm, Panel.METHOD] = Field(
        "l1", description="How the gradients of several samples combine: l1 or l2."
    )
    alpha: Annotated[float, Panel.METHOD] = Field(
        100.0, ge=0, description=f"Weight of the gradient term; used only with {_readers('alpha')}."
    )
    allocation: Annotated[AllocationName | None, Panel.METHOD] = Field(
        None,
        description=f"How much each layer keeps. {describe(ALLOCATIONS)}. If unset: sensitivity if the method "
        "reads gradients and the pattern is unstructured, else uniform.",
    )
    fit: FitName = Field("balanced", description=f"How the surviving weights are adjusted. {describe(FITS)}.")
    rounds: Annotated[Count, Panel.FIT] = Field(
        1,
        description=f"Number of fits of each block; used only with {_readers('rounds')}. The mask is "
        "chosen again before each fit but the first. Pruned weights are updated too (Wanda++).",
    )
    quantise: QuantiserName = Field(
        "none", description=f"Values that the surviving weights may take. {describe(QUANTISERS)}."
    )
    group: Annotated[Group | None, BeforeValidator(_number), Panel.FIT] = Field(
        None,
        description=f"Weights that share a scale: the whole row, or this many neighbouring columns. If unset: "
        f"{GROUP_DEFAULTS}. Used only with {_readers('group')}.",
    )
    ignore: Annotated[tuple[str, ...], Panel.METHOD] = Field(
        (), description="Layers not to prune, as shell-style patterns of full names."
    )
    overrides: Annotated[tuple[OverrideSettings, ...], Panel.METHOD] = Field(
        (),
        description="Exceptions by layer; the last match counts. For example '*.down_proj=6:8', '*.0.*=dense' "
        "or '*.o_proj=unstructured@0.3'.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset, nothing_to_rank = values.get("preset"), values.get("pattern") == DENSE
        given = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        return ({"method": "magnitude"} if nothing_to_rank else {}) | given | values

    @model_validator(mode="after")
    def _check(self) -> Self:
        budget = budget_of(self.pattern, self.sparsity)
        if self.pattern == DENSE and self.quantise == "none":
            raise ValueError("pattern 'dense' prunes nothing; add quantise int4 or int8, or choose another pattern")
        if self.pattern == DENSE and (self.method != "magnitude" or self.allocation not in (None, "uniform")):
            raise ValueError(
                "pattern 'dense' prunes nothing, so method and allocation would do nothing; leave them out"
            )
        if self.allocation is None:  # not marked as set, so a saved recipe holds only the given keys
            free = Need.GRADIENTS in METHODS[self.method].needs and budget.pattern.n_m is None
            self.__dict__["allocation"] = "sensitivity" if free else "uniform"
        preset = PRESETS.get(self.preset or "", {})
        for name, field in type(self).model_fields.items():
            value, where = getattr(self, name), _readers(name)
            if where and name not in self.read and value not in (field.default, preset.get(name)):
                raise ValueError(f"{name} {value} would do nothing: only {where} reads it")
        return self

    @property
    def allocates(self) -> Allocation:
        return ALLOCATIONS[self.allocation or "uniform"]

    @property
    def choices(self) -> tuple[Method, FitChoice, Quantiser, Allocation]:
        return METHODS[self.method], self.fits, QUANTISERS[self.quantise], self.allocates

    @property
    def columns_of_a_scale(self) -> int | None:
        """None for a whole row."""
        return columns_of_a_scale(self.quantise, self.group)

    @property
    def grid(self) -> str | None:
        """In words; None if survivors are not rounded."""
        return grid_in_words(self.quantise, self.group)

    @property
    def read(self) -> frozenset[str]:
        """The keys that this combination reads, without the keys that all combinations read."""
        return frozenset(key for choice in self.choices for key in choice.keys)

    @property
    def block_needs(self) -> Need:
        """The statistics of each block, measured when it is pruned."""
        method, fit, quantiser, _ = self.choices
        return method.needs | fit.needs | quantiser.needs

    @property
    def needs(self) -> Need:
        """`block_needs`, and the statistics that the allocation needs before."""
        return self.block_needs | self.allocates.needs

    @property
    def needs_gradients(self) -> bool:
        return Need.GRADIENTS in self.needs

    @property
    def needs_blocks(self) -> bool:
        """Whether the blocks run one by one on the text while they are pruned."""
        return bool(self.block_needs & Need.BLOCKS) or self.fits.fits_block

    @property
    def needs_text(self) -> bool:
        return bool(self.needs) or self.needs_blocks or self.fits.fits_model

    @property
    def fits(self) -> FitChoice:
        return FITS[self.fit]

    def budgets(self, names: list[str]) -> dict[str, Budget]:
        """Budgets before an allocation. UsageError if an override matches no layer."""
        budgets = dict.fromkeys(names, self.uniform_budget)
        for override in self.overrides:
            if not (matches := [name for name in names if override.matches(name)]):
                raise UsageError(
                    f"override {override.layers!r} matches no pruned layer; a layer is for example {names[0]!r}"
                )
            budgets |= dict.fromkeys(matches, override.budget)
        return budgets

    @property
    def uniform_budget(self) -> Budget:
        return budget_of(self.pattern, self.sparsity)

    def changes(self, pattern: Pattern) -> bool:
        """Whether layers of a pattern are pruned or rounded."""
        return pattern.name != DENSE or self.grid is not None

    def is_exception(self, name: str) -> bool:
        return any(override.matches(name) for override in self.overrides)

    def may_move(self, name: str, pattern: Pattern) -> bool:
        """Whether the allocation may give a layer of an N:M pattern another N."""
        n, _ = pattern.n_m or (1, 1)
        return self.allocation != "uniform" and n > 1 and not self.is_exception(name)
