"""Recipes: YAML files that describe a whole run. Every fault of a file is reported at once, with its line.

Only this module knows YAML; ruamel reads it as YAML 1.2. Anchors, aliases and tags are refused and the size is limited.
So nothing in a file can grow, refer to itself or name a type.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode, SequenceNode

from gblm_compress import errors, recipes
from gblm_compress.errors import RecipeError, UsageError
from gblm_compress.settings import Recipe
from gblm_compress.settings.fields import choices_of

SHIPPED = Path(recipes.__path__[0])
MAX_BYTES, MAX_KEYS = 64 * 1024, 16
KINDS = ("map", "seq", "str", "null", "bool", "int", "float", "timestamp", "merge", "value")  # of untagged values
MAX_DIGITS = 40  # characters of a number; Python's own conversion is quadratic, and fails beyond 4,300
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # YAML's escapes can make them


@dataclass
class Node:
    """A value and its place in words."""

    where: str
    value: Any

    def plain(self) -> Any:
        """The value without places; sequences are tuples."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return tuple(node.plain() for node in self.value) if isinstance(self.value, list) else self.value

    def at(self, location: tuple[Any, ...]) -> "Node":
        """The deepest existing node on the way to `location`."""
        node = self
        for part in location:
            children = dict(enumerate(node.value)) if isinstance(node.value, list) else node.value
            if isinstance(children, dict) and part in children:
                node = children[part]
        return node


def find_recipe(name: str) -> Path:
    """The file of a recipe, given as a path or as the name of a shipped one."""
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if path.stem in shipped and name in (path.stem, f"recipes/{path.name}"):
        return shipped[path.stem]
    fault = "is not a file" if os.path.exists(path) else "no such file"
    close = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(f"recipe {name!r}: {fault}; {hint}shipped recipes are {', '.join(shipped)}")


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """`overrides` are `key=value` with dotted keys and YAML values. A RecipeError lists every fault."""
    try:
        with path.open("rb") as file:
            tree = read_yaml(file.read(MAX_BYTES + 1), lambda line: f"{path}:{line}")
    except OSError as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
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


def recipe_of(content: Mapping[str, Any]) -> Recipe:
    """A recipe from Python; a UsageError lists every fault."""
    try:
        return Recipe(**content)
    except ValidationError as error:
        raise UsageError("\n".join(f"recipe: {describe_fault(fault, Recipe)}" for fault in faults_of(error))) from error


def _all_of(messages: list[str]) -> RecipeError:
    count = "1 fault" if len(messages) == 1 else f"{len(messages)} faults"
    return errors.together(RecipeError, f"{count} in the recipe", messages)


def schema() -> dict[str, Any]:
    result = Recipe.model_json_schema()
    # A string may be a model's source, a text with its weight, or an exception.
    data, overrides = (
        result["$defs"][settings]["properties"][key]["items"]
        for settings, key in (("RecoverSettings", "data"), ("PruneSettings", "overrides"))
    )
    for section in (result["properties"]["model"], data, overrides):
        section["anyOf"] = [{"$ref": section.pop("$ref")}, {"type": "string"}]
    # A single mapping counts as a sequence of one.
    gates = result["properties"]["gates"]
    gates["anyOf"] = [gates["items"], {"type": gates.pop("type"), "items": gates.pop("items")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def faults_of(error: ValidationError) -> list[Any]:
    """The faults without duplicates: pydantic also counts faulty items as missing."""
    return [fault for fault in error.errors() if not (fault["type"] == "too_short" and fault["input"])]


def describe_fault(fault: Any, model: type[BaseModel]) -> str:
    location = fault["loc"]
    where, settings = ".".join(map(str, location)), _model_at(model, location[:-1])
    if fault["type"] == "extra_forbidden":
        keys = difflib.get_close_matches(str(location[-1]), settings.model_fields, n=1)
        hint = f"did you mean {keys[0]!r}?" if keys else f"known keys are {', '.join(settings.model_fields)}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing; it is required"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type" and isinstance(location[-1], str):
        optional = type(None) in get_args(settings.model_fields[location[-1]].annotation)
        message = f"a section is a mapping of keys{', or null to leave it out' if optional else ''}"
    message = message[0].lower() + message[1:]
    given = "" if fault["type"] == "value_error" else f", got {_shortened(json.dumps(fault['input'], default=str))}"
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        field = next(part for part in reversed(location) if isinstance(part, str))
        if close := choices_of(settings, field).closest(fault["input"]):
            given += f"; did you mean {close!r}?"
    is_percentage = fault["type"] == "less_than" and fault["ctx"]["lt"] == 1 and isinstance(fault["input"], int | float)
    if is_percentage and 1 < fault["input"] < 100:
        given += f"; did you mean {fault['input'] / 100:g}?"
    return f"{where}: {message}{given}" if where else message + given


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _model_at(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    for part in location:
        if part not in model.model_fields:  # a place in a sequence
            continue
        annotation: Any = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _override(tree: Node, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_KEYS:
        raise UsageError(f"--set {override!r}: give key=value, for example --set prune.sparsity=0.6")
    where = f"--set {key}"
    node, value = tree, read_yaml(text.encode(errors="surrogateescape"), lambda line: where).value
    for part in parts:
        if isinstance(node.value, str) and node is tree.value.get("model"):
            node.value = {"source": Node(node.where, node.value)}
        if isinstance(node.value, dict):
            node = node.value.setdefault(part, Node(where, {}))
        elif isinstance(node.value, list) and part in map(str, range(len(node.value))):
            node = node.value[int(part)]
        else:
            raise UsageError(f"--set {override!r}: the recipe has no key {key!r}")
    node.where, node.value = where, value


def read_yaml(content: bytes, where: Callable[[int], str]) -> Node:
    """Read one document; `where` names a line, counted from 1. A RecipeError lists every fault."""
    faults: list[str] = []
    try:
        if len(content) > MAX_BYTES:
            raise YAMLError(f"more than {MAX_BYTES:,} bytes")
        node = YAML(typ="safe", pure=True).compose(content.decode("utf-8-sig"))
        tree = Node(where(1), None) if node is None else _tree(node, where, faults)
    except RecursionError:
        faults.append(f"{where(1)}: nested too deeply")
    except (YAMLError, ArithmeticError, LookupError, ValueError) as error:  # ruamel does not check every escape
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        position = getattr(error, "position", getattr(error, "start", None)) or 0
        line = mark.line + 1 if mark else content.count(b"\n", 0, position) + 1
        said = [part for name in ("context", "problem") if (part := getattr(error, name, None))]
        faults.append(f"{where(line)}: not valid YAML: {', '.join(said) or str(error).splitlines()[0]}")
    if faults:
        raise _all_of(faults)
    return tree


def _tree(node: Any, where: Callable[[int], str], faults: list[str], place: str = "") -> Node:
    """The values below a ruamel node. A value in a mapping has the place of its key."""
    place = place or where(node.start_mark.line + 1)
    kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if node.anchor is not None:  # its content may refer to itself without end
        faults.append(f"{place}: &{node.anchor} is an anchor; anchors and aliases are not supported")
        return Node(place, None)
    if kind not in KINDS:
        faults.append(f"{place}: {kind!r} is a tag; tags are not supported")
    if isinstance(node, SequenceNode):
        return Node(place, [_tree(item, where, faults) for item in node.value])
    if isinstance(node, ScalarNode):
        if _NO_TEXT.search(node.value):
            faults.append(f"{place}: {node.value!r} holds NUL or half a character, which names and paths cannot")
        if kind not in ("null", "bool", "int", "float"):
            return Node(place, node.value)
        if len(node.value) > MAX_DIGITS:
            faults.append(f"{place}: a number of {len(node.value):,} characters; the limit is {MAX_DIGITS}")
            return Node(place, None)
        value = YAML(typ="safe", pure=True).constructor.construct_object(node)
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        return Node(place, int(value) if whole else value)  # in JSON, too, 2.0 is an integer
    found: dict[str, Node] = {}
    for key, value in node.value:
        here = where(key.start_mark.line + 1)
        if not isinstance(key, ScalarNode):
            faults.append(f"{here}: a key is a mapping or a sequence; keys must be text")
        elif key.value in found:
            faults.append(f"{here}: key {key.value!r} appears twice")
        else:
            found[key.value] = _tree(value, where, faults, here)  # a key is its text, as in JSON
    return Node(place, found)
