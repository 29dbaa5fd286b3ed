"""Recipes: YAML files that describe a whole run.

Every fault of a file is reported at once, with its line and, for a misspelt key, a suggestion.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gblm_compress import errors, recipes
from gblm_compress.errors import RecipeError, UsageError
from gblm_compress.runs import yaml_nodes
from gblm_compress.runs.yaml_nodes import Node, YamlFaults
from gblm_compress.settings import Recipe
from gblm_compress.settings.fields import meant
from gblm_compress.storage.paths import kind_of, local

MOST_FAULTS = 100  # that are printed
SHIPPED = Path(recipes.__path__[0])


def find_recipe(name: str) -> Path:
    """The file of a recipe, given as a path or as the name of a shipped one.

    Raises:
        UsageError: there is neither, or the path is no file.
    """
    path = local(name)
    if kind_of(path) == "file":
        return path
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if path.stem in shipped and name in (path.stem, f"recipes/{path.name}"):
        return shipped[path.stem]
    fault = "is no file" if kind_of(path) else "no such file"
    raise UsageError(f"recipe {name!r}: {fault}; shipped recipes are {', '.join(shipped)}")


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` pairs with dotted keys, applied before validation; values are YAML.

    Raises:
        RecipeError: listing every fault.
        UsageError: an override is malformed.
    """
    tree = _read(path)
    if not isinstance(tree.value, dict):
        kind = "a sequence" if isinstance(tree.value, list) else json.dumps(tree.value)
        raise RecipeError(f"{tree.where}: a recipe is a mapping with a key 'model'; this is {_shortened(kind)}")
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree.plain(), strict=True)
    except ValidationError as error:
        found = [f"{tree.at(fault['loc']).where}: {describe_fault(fault, Recipe)}" for fault in faults_of(error)]
        raise _all_of(found) from error


def _read(path: Path) -> Node:
    try:
        with path.open("rb") as file:
            content = file.read(yaml_nodes.MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        return yaml_nodes.read(content, lambda line: f"{path}:{line}")
    except YamlFaults as error:
        raise _all_of(error.faults) from error


def _all_of(messages: list[str]) -> RecipeError:
    count = "1 fault" if len(messages) == 1 else f"{len(messages)} faults"
    return errors.together(RecipeError, f"{count} in the recipe", messages, MOST_FAULTS)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    result = Recipe.model_json_schema()
    # A plain string stands for a model section with only a source, and for a text with its weight.
    for section in (result["properties"]["model"], result["$defs"]["RecoverSettings"]["properties"]["data"]["items"]):
        section["anyOf"] = [{"$ref": section.pop("$ref")}, {"type": "string"}]
    # A mapping stands for a sequence of one.
    gates = result["properties"]["gates"]
    gates["anyOf"] = [gates["items"], {"type": gates.pop("type"), "items": gates.pop("items")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def faults_of(error: ValidationError) -> list[Any]:
    """The faults that a user made: pydantic counts faulty items as missing, and reports them as such a second time."""
    return [fault for fault in error.errors() if not (fault["type"] == "too_short" and fault["input"])]


def describe_fault(fault: Any, model: type[BaseModel]) -> str:
    """One validation error in words: where, what was given, and a suggestion for what is misspelt."""
    location = [part for part in fault["loc"] if part != "function-before[_source_alone(), ModelSettings]"]
    where = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        known = _model_at(model, location[:-1]).model_fields
        keys = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {keys[0]!r}?" if keys else f"known keys are {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing; it is required"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if fault["type"] == "value_error" else f", got {_shortened(json.dumps(fault['input'], default=str))}"
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        field = next(part for part in reversed(location) if isinstance(part, str))
        settings = _model_at(model, location[: location.index(field)])
        if close := meant(fault["input"], settings, field):
            given += f"; did you mean {close!r}?"
    return f"{where}: {message}{given}" if where else message + given


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _model_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel]:
    """The settings that a location within `model` leads to."""
    for part in location:
        if part not in model.model_fields:  # a place in a sequence
            continue
        annotation: Any = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _override(tree: Node, override: str) -> None:
    """Set one dotted key of the recipe that was read."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {override!r}: give key=value, for example --set prune.sparsity=0.6")
    where = f"--set {key}"
    try:
        value = yaml_nodes.read(text.encode(errors="surrogateescape"), lambda line: where).value
    except YamlFaults as error:
        raise UsageError(str(error)) from error
    node = tree
    for part in parts[: yaml_nodes.MAX_DEPTH]:
        if isinstance(node.value, str) and node is tree.value.get("model"):
            node.value = {"source": Node(node.where, node.value)}
        if isinstance(node.value, dict):
            node = node.value.setdefault(part, Node(where, {}))
        elif isinstance(node.value, list) and part in map(str, range(len(node.value))):
            node = node.value[int(part)]
        else:
            raise UsageError(f"--set {override!r}: the recipe has no place {key!r}")
    node.where, node.value = where, value
