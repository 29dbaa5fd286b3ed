"""Recipes: YAML files that describe a whole run. This is the only module that knows YAML.

Every fault of a file is reported at once, with its line and, for a misspelt key, a suggestion.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gblm_compress.errors import RecipeError, UsageError
from gblm_compress.settings import Recipe

SHIPPED = Path(__file__).parent / "recipes"


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's base-60 numbers, to which `2:4` would be 124, and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def find_recipe(name: str) -> Path:
    """The file of a recipe, given as a path or as the name of a shipped one.

    Raises:
        UsageError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if path.stem in shipped and name in (path.stem, f"recipes/{path.name}"):
        return shipped[path.stem]
    raise UsageError(f"recipe {name!r}: no such file; shipped recipes are {', '.join(shipped)}")


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` pairs with dotted keys, applied before validation; values are YAML.

    Raises:
        RecipeError: listing every fault.
        UsageError: an override is malformed.
    """
    try:
        source = path.read_text(encoding="utf-8")
        content = yaml.load(source, _Loader)
        tree = yaml.compose(source, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with a key 'model'; this is {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        faults = [f"{path}:{_line(tree, fault['loc'])}: {describe_fault(fault, Recipe)}" for fault in faults_of(error)]
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{count} in the recipe\n" + "\n".join(faults)) from error


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    result = Recipe.model_json_schema()
    # A plain string stands for a model section with only a source.
    reference = result["properties"]["model"].pop("$ref")
    result["properties"]["model"]["anyOf"] = [{"$ref": reference}, {"type": "string"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def faults_of(error: ValidationError) -> list[Any]:
    """The faults that a user made: pydantic counts faulty items as missing, and reports them as such a second time."""
    return [fault for fault in error.errors() if not (fault["type"] == "too_short" and fault["input"])]


def describe_fault(fault: Any, model: type[BaseModel]) -> str:
    """One validation error in words: where, what was given, and a suggestion for a misspelt key."""
    location = [part for part in fault["loc"] if part != "function-before[_source_alone(), ModelSettings]"]
    where = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing; it is required"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if fault["type"] == "value_error" else f", got {json.dumps(fault['input'], default=str)}"
    return f"{where}: {message}{given}" if where else message + given


def _keys_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    for part in location:
        if not isinstance(part, str):
            continue
        annotation: Any = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _line(node: Any, location: tuple[Any, ...]) -> int:
    """The line of the deepest part of `location` that the file has."""
    line: int = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = next(((key, value) for key, value in node.value if key.value == part), None)
            if match is None:
                return line
            line, node = match[0].start_mark.line + 1, match[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key of the parsed recipe."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override!r}: give key=value, for example --set prune.sparsity=0.6")
    *parents, last = key.split(".")
    target: Any = content
    try:
        for part in parents:
            if isinstance(target, list):
                target = target[int(part)]
            else:
                if isinstance(target.get(part), str) and part == "model":
                    target[part] = {"source": target[part]}
                target = target.setdefault(part, {})
        parsed = yaml.load(value, _Loader)
        if isinstance(target, list):
            target[int(last)] = parsed
        else:
            target[last] = parsed
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UsageError(f"--set {override!r}: the recipe has no place {key!r}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override!r}: {value!r} is not valid YAML") from error
