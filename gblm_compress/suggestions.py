"""What a user may have meant by a value that is not known: a name from elsewhere, another setting's, a misspelt one."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel


@dataclass(frozen=True)
class Synonyms:
    """In the metadata of a field: what other tools and papers call its values, as {value: names}."""

    names: Mapping[str, Iterable[str]]

    def find(self, given: str) -> str | None:
        """The value that a name stands for, without case and punctuation."""
        name = plain(given)
        return next((value for value, names in self.names.items() if name in map(plain, names)), None)


def synonyms_of(registry: Mapping[str, Any]) -> Synonyms:
    """Those that the entries of a registry say."""
    return Synonyms({name: entry.synonyms for name, entry in registry.items()})


def meant(given: str, model: type[BaseModel], field: str, spell: Callable[[str, str], str]) -> str | None:
    """A suggestion for a value that `field` does not know, as the end of a sentence; None where there is none.

    Args:
        spell: how a setting is written where the value was given.
    """
    name = plain(given)
    known = allowed(model, field)
    metadata = model.model_fields[field].metadata if field in model.model_fields else ()
    for synonyms in (entry for entry in metadata if isinstance(entry, Synonyms)):
        if (value := synonyms.find(given)) in known:
            return f"{given} is here {spell(field, value)}"
    others = [other for other in model.model_fields if other != field and name in map(plain, allowed(model, other))]
    if others:
        value = next(value for value in allowed(model, others[0]) if plain(value) == name)
        return f"{given} is {spell(others[0], value)}"
    close = difflib.get_close_matches(given.lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def allowed(model: type[BaseModel], field: str) -> tuple[str, ...]:
    """The values that a field may have, where they are named: those of a Literal, alone or in a sequence."""
    return _texts(model.model_fields[field].annotation) if field in model.model_fields else ()


def plain(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == "+")


def _texts(annotation: Any) -> tuple[str, ...]:
    if isinstance(annotation, str | int):
        return (str(annotation),)
    return tuple(text for argument in get_args(annotation) for text in _texts(argument))
