"""A command is a function of `api`: its signature, settings, docstring and example declare it.

A parameter is `Annotated[type, "its help"]`, or settings, which become one keyword per field.
"""

import difflib
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

from pydantic import ValidationError

from gblm_compress.errors import UsageError
from gblm_compress.machine import cache_folder, keep
from gblm_compress.runs.recipe import describe_fault, faults_of
from gblm_compress.settings import Settings
from gblm_compress.storage.records import write_file

R = TypeVar("R")
REQUIRED = "required on the command line"
"""Marks a parameter that only Python may leave out."""


SPELLINGS = {"overrides": "override"}


def flag_of(name: str) -> str:
    """The option of a parameter, or of a field."""
    return f"--{SPELLINGS.get(name, name).replace('_', '-')}"


@dataclass(frozen=True)
class Part:
    """Settings of a command; `names` is {field: keyword}, without the fields that it leaves out."""

    kind: type[Settings]
    names: Mapping[str, str]

    @classmethod
    def of(cls, annotation: Any) -> "Part | None":
        """The settings of a parameter: a class, or `Annotated[class, {field: keyword, or None to leave it out}]`."""
        kind, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
        if not (isinstance(kind, type) and issubclass(kind, Settings)):
            return None
        renamed: dict[str, str | None] = metadata[0] if metadata else {}
        names = {field: renamed.get(field, field) for field in kind.model_fields}
        return cls(kind, {field: name for field, name in names.items() if name is not None})


@dataclass(frozen=True)
class Command:
    function: Callable[..., Any]
    example: str  # a command line
    own: Mapping[str, Parameter]
    parts: Mapping[str, Part]

    @property
    def name(self) -> str:
        return self.function.__name__

    def fill(self, values: Mapping[str, Any], spell: Callable[[str], str]) -> dict[str, Settings]:
        """The settings from these keywords. One UsageError lists all faults; `spell` writes a keyword."""
        known = {name: part for part in self.parts.values() for name in part.names.values()}
        faults = [f"{self.name}: {name}: unknown; {self._meant(name, known)}" for name in values if name not in known]
        filled = {}
        for parameter, part in self.parts.items():
            given = {field: values[name] for field, name in part.names.items() if name in values}
            try:
                filled[parameter] = part.kind(**{field: plain(field, value) for field, value in given.items()})
            except ValidationError as error:
                faults += [_in_words(fault, part, spell) for fault in faults_of(error)]
        if faults:
            raise UsageError("\n".join(faults))
        return filled

    def _meant(self, name: str, known: Iterable[str]) -> str:
        close = difflib.get_close_matches(name, [*known, *self.own], n=1)
        return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"

    def signature(self) -> inspect.Signature:
        own = [parameter.replace(annotation=get_args(parameter.annotation)[0]) for parameter in self.own.values()]
        fields = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation)
            for part in self.parts.values()
            for key, name in part.names.items()
            for field in [part.kind.model_fields[key]]
            for default in [Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)]
        ]
        return inspect.Signature([*own, *fields], return_annotation=inspect.signature(self.function).return_annotation)

    def documentation(self) -> str:
        summary, _, more = (inspect.getdoc(self.function) or "").partition("\n\n")
        entries = [(name, get_args(parameter.annotation)[1]) for name, parameter in self.own.items()]
        for part in self.parts.values():
            entries += [(name, part.kind.model_fields[field].description) for field, name in part.names.items()]
        arguments = "\n".join(["Args:", *(f"    {name}: {text}" for name, text in entries)])
        return "\n\n".join(filter(None, [summary, self.example and f"Example: {self.example}", more, arguments]))


def command(example: str = "") -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Declares a command; its Python function takes the fields of its settings as keywords."""

    def declare(function: Callable[..., R]) -> Callable[..., R]:
        parameters = inspect.signature(function).parameters
        parts = {name: part for name, p in parameters.items() if (part := Part.of(p.annotation))}
        own = {name: p for name, p in parameters.items() if name not in parts}
        declared = Command(function, example, own, parts)

        @functools.wraps(function)
        def called(*arguments: Any, **keywords: Any) -> R:
            own = {name: value for name, value in keywords.items() if name in declared.own}
            rest = {name: value for name, value in keywords.items() if name not in own}
            return function(*arguments, **own, **declared.fill(rest, lambda name: f"{declared.name}: {name}"))

        called.__doc__ = declared.documentation()
        completed = cast(Any, called)
        completed.__signature__, completed.command = declared.signature(), declared
        return called

    return declare


def _in_words(fault: Any, part: Part, spell: Callable[[str], str]) -> str:
    """A fault of settings, with its keyword, and the number of the item."""
    text = describe_fault(fault, part.kind)
    if not fault["loc"]:
        return text
    field, *inner = fault["loc"]
    number = f" (number {inner[0] + 1}), {inner[1]}" if len(inner) > 1 else ""
    return f"{spell(part.names.get(field, field))}{number}: {text.partition(': ')[2]}"


def plain(field: str, value: Any) -> Any:
    """A value for settings: a path becomes text, and texts in memory become a file."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    in_memory = field == "dataset" and isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return text_file(value) if in_memory else value


def text_file(texts: Iterable[str] | Iterable[Mapping[str, Any]]) -> str:
    """Texts, or rows with a text, as a file in the cache. Its name is a hash of the content, so a run can resume."""
    from gblm_compress import tasks

    rows = [dict(text) if isinstance(text, Mapping) else {"text": text} for text in texts]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path = cache_folder() / "texts" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_file(path, content)
    keep(path)
    tasks.data_files(str(path))
    return str(path)
