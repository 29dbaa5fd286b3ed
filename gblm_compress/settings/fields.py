"""The base class of settings, and the types and limits of their fields."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import core_schema

from gblm_compress.errors import UsageError
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.patterns import DENSE, N_M, PER_MATRIX, UNSTRUCTURED, Pattern


@dataclass(frozen=True, eq=False)
class OneOf:
    """Metadata of a field: its values, and {name in other tools and papers: our value}."""

    values: tuple[str | int, ...]
    synonyms: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, registry: Mapping[str, Any]) -> "OneOf":
        """The present entries of a registry."""
        synonyms = {other: name for name, entry in registry.items() for other in getattr(entry, "synonyms", ())}
        return cls(tuple(registry), synonyms)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.literal_schema(list(self.values))

    def closest(self, given: str) -> str | None:
        """The value with the closest name or synonym; None if none is close."""

        def plain(name: str) -> str:
            return "".join(letter for letter in name.lower() if letter.isalnum() or letter == "+")

        known = {plain(name): value for name, value in self.synonyms.items()}
        known |= {plain(str(value)): str(value) for value in self.values}
        close = difflib.get_close_matches(plain(given), known, n=1)
        return known[close[0]] if close else None


Dtype = Annotated[
    str,
    OneOf(
        ("auto", "float32", "float16", "bfloat16"),
        {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"},
    ),
]
SELF = "self"
"""The name of the text that a language model writes for its own pruning or recovery."""
MANY = 10_000_000  # the largest count; a larger one is a mistake and would exhaust memory
LEAST_MEMORY = 1_000_000  # bytes; a smaller number lacks its unit
MEMORY = r"^[0-9]{7,18}$|^[0-9]{1,9}(\.[0-9]{1,9})? ?[MmGgTt][Ii]?[Bb]$"
COUNT = r"^[0-9]{1,12}(\.[0-9]{1,9})? ?[kKmMbB]?$"
UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def _has_unit(value: Any) -> Any:
    enough = (
        re.fullmatch(MEMORY, value) if isinstance(value, str) else not isinstance(value, int) or value >= LEAST_MEMORY
    )
    if not enough:
        raise ValueError(f"memory {value!r} has no known unit; give for example 4GiB or 4GB")
    return value


def _count(value: Any) -> Any:
    """A number of tokens, with or without a unit: 500k, 2M, 1.5B."""
    if isinstance(value, str):
        if not re.fullmatch(COUNT, value):
            raise ValueError(f"{value!r} is not a number of tokens; give for example 500k, 2M or 1.5B")
        number = value.rstrip("kKmMbB")
        return round(float(number) * UNITS[value[len(number) :].lower()])
    return value


def _given(dataset: str) -> str:
    if dataset == SELF:
        raise ValueError(f"{SELF!r} is the model's own text, only for pruning and training; give another text")
    return dataset


def budget_of(pattern: str, sparsity: float | None = None) -> Budget:
    """A pattern with its share of zeros, for validators: ValueError if it is unknown or contradicts the share."""
    try:
        parsed = Pattern(pattern)
        return Budget(parsed, parsed.sparsity(sparsity))
    except UsageError as error:
        raise ValueError(str(error)) from error


def _spelt(*names: str) -> Any:
    return Field(json_schema_extra={"pattern": f"^({'|'.join(names)})$", "examples": ["2:4", UNSTRUCTURED]})


def _known(pattern: str) -> str:
    return budget_of(pattern).pattern.name


def _pruning(pattern: str) -> str:
    if pattern == DENSE:
        raise ValueError("pattern 'dense' prunes nothing")
    return _known(pattern)


Tokens = Annotated[
    int,
    BeforeValidator(_count),
    Field(ge=1, le=10**13),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": COUNT}, {"type": "integer", "minimum": 1}]}),
]
Count = Annotated[int, Field(ge=1, le=MANY)]
Several = Annotated[int, Field(ge=2, le=MANY)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
GivenText = Annotated[str, AfterValidator(_given)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
PatternName = Annotated[str, AfterValidator(_pruning), _spelt(UNSTRUCTURED, PER_MATRIX, N_M)]
PatternOrDense = Annotated[str, AfterValidator(_known), _spelt(DENSE, UNSTRUCTURED, PER_MATRIX, N_M)]
Memory = Annotated[
    ByteSize,
    BeforeValidator(_has_unit),
    Field(ge=LEAST_MEMORY),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": MEMORY}, {"type": "integer", "minimum": LEAST_MEMORY}]}),
]


FILES = ".txt/.raw/.tokens/.jsonl/.parquet file"
DATA = f"wikitext2, c4, a hub dataset, 'demo', a {FILES} (or .csv, for encoders), or a folder of images"
WHERE_ZEROS_GO = (
    "unstructured (equally many in every output row), unstructured-per-matrix, or N:M (at most N nonzeros in every M "
    "weights along the input)"
)
SPARSITY = "Fraction of zeros; 0.5 if unset. A pattern N:M sets it."


class Panel(Enum):
    """The section of the help that lists a field. `--help` shows Common, the default; `--help-all` shows all."""

    COMMON = "Common"
    METHOD = "Method"
    FIT = "Fit"
    MORE = "More"
    RESOURCES = "Resources"
    NO_OPTION = "recipes and Python only"  # the command line has no option for the field


class Settings(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Settings):
    """A dataset, and its share."""

    dataset: str = Field(description=f"{SELF} (a language model writes the text itself), {DATA}.")
    weight: float = Field(1.0, gt=0, le=1e9, description="Share, relative to the other weights.")

    def __str__(self) -> str:
        return self.dataset if self.weight == 1 else f"{self.dataset}={self.weight:g}"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return weighted(value) if isinstance(value, str) else value


def weighted(text: str) -> dict[str, Any]:
    """The fields of a `Source` that `SRC` or `SRC=WEIGHT` names, as they were given."""
    dataset, _, weight = text.rpartition("=")
    try:
        return {"dataset": dataset, "weight": float(weight)} if dataset else {"dataset": text}
    except ValueError:  # an equals sign in the name
        return {"dataset": text}


def mixed(given: Any) -> Any:
    """Split `SRC[=WEIGHT],...`; other values stay as they are."""
    return tuple(part.strip() for part in given.split(",") if part.strip()) if isinstance(given, str) else given


def joined(sources: tuple[Source, ...]) -> str:
    return ",".join(map(str, sources))


Mix = Annotated[
    tuple[Source, ...],
    BeforeValidator(mixed),
    Field(max_length=100),
    PlainSerializer(joined),
    WithJsonSchema({"type": "string"}),
]


def choices_of(settings: type[BaseModel], name: str) -> OneOf:
    """The values of a field, or of the items of a sequence; empty if they are not listed."""
    described = settings.model_fields.get(name)
    annotations = [described.annotation, *described.metadata] if described else []
    for annotation in annotations:
        if isinstance(annotation, OneOf):
            return annotation
        if get_origin(annotation) is Literal:
            return OneOf(get_args(annotation))
        annotations += get_args(annotation)
    return OneOf(())
