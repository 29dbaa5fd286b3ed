"""The base class of settings, and the types and limits of their fields."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, WithJsonSchema

from gblm_compress.methods.patterns import DENSE, N_M, PER_MATRIX, UNSTRUCTURED


@dataclass(frozen=True)
class Synonyms:
    """Metadata of a field: {name in other tools and papers: our value}."""

    names: Mapping[str, str]


def synonyms_of(registry: Mapping[str, Any]) -> Synonyms:
    return Synonyms({name: value for value, entry in registry.items() for name in entry.synonyms})


DTYPE_SYNONYMS = Synonyms(
    {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
)
Dtype = Annotated[Literal["auto", "float32", "float16", "bfloat16"], DTYPE_SYNONYMS]
FitDtype = Annotated[Literal["auto", "float32", "bfloat16"], DTYPE_SYNONYMS]
MANY = 10_000_000  # the most of anything counted; a larger number is a mistake and would exhaust memory
LEAST_MEMORY = 1_000_000  # bytes; a smaller number lacks its unit
MEMORY = r"^[0-9]{7,18}$|^[0-9]{1,9}(\.[0-9]{1,9})? ?[MmGgTt][Ii]?[Bb]$"
MOST_TOKENS = 10**13
COUNT = r"^[0-9]{1,12}(\.[0-9]{1,9})? ?[kKmMbB]?$"
UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def _has_unit(value: Any) -> Any:
    enough = (
        re.fullmatch(MEMORY, value) if isinstance(value, str) else not isinstance(value, int) or value >= LEAST_MEMORY
    )
    if not enough:
        raise ValueError(f"memory {value!r} has no unit, or not one that is known; give for example 4GiB or 4GB")
    return value


def _count(value: Any) -> Any:
    """A number of tokens that may be written with a unit: 500k, 2M, 1.5B."""
    if isinstance(value, str):
        if not re.fullmatch(COUNT, value):
            raise ValueError(f"{value!r} is no number of tokens; give for example 500k, 2M or 1.5B")
        number = value.rstrip("kKmMbB")
        return round(float(number) * UNITS[value[len(number) :].lower()])
    return value


def _tokens(least: int) -> Any:
    schema = {"anyOf": [{"type": "string", "pattern": COUNT}, {"type": "integer", "minimum": least}]}
    return Annotated[int, BeforeValidator(_count), Field(ge=least, le=MOST_TOKENS), WithJsonSchema(schema)]


if TYPE_CHECKING:  # a type checker cannot read a type that is made
    Tokens: TypeAlias = int
    TokensOrNone: TypeAlias = int
else:
    Tokens, TokensOrNone = _tokens(1), _tokens(0)
Fraction = Annotated[float, Field(gt=0, lt=1)]
# `Pattern` also checks N < M, which this expression cannot.
PatternName = Annotated[
    str,
    Field(json_schema_extra={"pattern": f"^({UNSTRUCTURED}|{PER_MATRIX}|{N_M})$", "examples": ["2:4", UNSTRUCTURED]}),
]
PatternOrDense = Annotated[str, Field(json_schema_extra={"pattern": f"^({DENSE}|{UNSTRUCTURED}|{PER_MATRIX}|{N_M})$"})]
Memory = Annotated[
    ByteSize,
    BeforeValidator(_has_unit),
    Field(ge=LEAST_MEMORY),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": MEMORY}, {"type": "integer", "minimum": LEAST_MEMORY}]}),
]


class Panel(Enum):
    """The section of `--help` that lists a field; Common if it names none."""

    COMMON = "Common"
    METHOD = "Method"
    FIT = "Fit"
    RESOURCES = "Resources"
    NO_OPTION = "recipes and Python only"  # the command line has no option for the field


class Settings(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def allowed(settings: type[BaseModel], field: str) -> tuple[str, ...]:
    """The values of a field that is a Literal, or a sequence of one."""
    return _texts(settings.model_fields[field].annotation) if field in settings.model_fields else ()


def _texts(annotation: Any) -> tuple[str, ...]:
    if isinstance(annotation, str | int):
        return (str(annotation),)
    return tuple(text for argument in get_args(annotation) for text in _texts(argument))


def meant(given: str, settings: type[BaseModel], field: str) -> str | None:
    """The value that a user probably meant: by synonym or by spelling."""
    metadata = settings.model_fields[field].metadata if field in settings.model_fields else []
    synonyms = next((entry for entry in metadata if isinstance(entry, Synonyms)), Synonyms({}))
    return closest(given, allowed(settings, field), synonyms)


def closest(given: str, values: tuple[str, ...], synonyms: Synonyms) -> str | None:
    """The value with the closest name or synonym; None if none is close."""

    def plain(name: str) -> str:
        return "".join(letter for letter in name.lower() if letter.isalnum() or letter == "+")

    known = {plain(name): value for name, value in synonyms.names.items() if value in values}
    known |= {plain(value): value for value in values}
    close = difflib.get_close_matches(plain(given), known, n=1)
    return known[close[0]] if close else None
