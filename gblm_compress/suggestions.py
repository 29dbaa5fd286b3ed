"""What a user may have meant by a value that is not known: a name from elsewhere, another setting's, a misspelt one."""

import difflib
from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel

# What other tools and papers call it: the settings that stand for it here. Compared without case and punctuation.
ELSEWHERE: dict[str, dict[str, str]] = {
    "wanda++": {"method": "regional"},
    "wandapp": {"method": "regional"},
    "gblmpruner": {"method": "gblm"},
}
SYNONYMS = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "pytorch": "torch",
    "ort": "onnxruntime",
    "onnx": "onnxruntime",
    "sparse24": "semi-structured",
    "24": "semi-structured",
}


def meant(given: str, model: type[BaseModel], field: str, spell: Callable[[str, str], str]) -> str | None:
    """A suggestion for a value that `field` does not know, as the end of a sentence; None where there is none.

    Args:
        spell: how a setting is written where the value was given.
    """
    name = plain(given)
    allowed = choices(model, field)
    if SYNONYMS.get(name) in allowed:
        return f"did you mean {SYNONYMS[name]!r}?"
    if field in ELSEWHERE.get(name, {}):
        return f"{given} is here {' '.join(spell(key, value) for key, value in ELSEWHERE[name].items())}"
    others = [other for other in model.model_fields if other != field and name in map(plain, choices(model, other))]
    if others:
        return f"{given} is {spell(others[0], next(c for c in choices(model, others[0]) if plain(c) == name))}"
    close = difflib.get_close_matches(given.lower(), allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def choices(model: type[BaseModel], field: str) -> tuple[str, ...]:
    """The values that a field may have, where they are named: those of a Literal, alone or in a sequence."""
    return _texts(model.model_fields[field].annotation) if field in model.model_fields else ()


def plain(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == "+")


def _texts(annotation: Any) -> tuple[str, ...]:
    if isinstance(annotation, str):
        return (annotation,)
    return tuple(text for argument in get_args(annotation) for text in _texts(argument))
