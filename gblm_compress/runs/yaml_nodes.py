"""YAML 1.2 as plain values with their positions, read by ruamel. This is the only module that knows YAML.

Anchors, aliases and tags are refused, and size, depth and number of values are limited, so that nothing in a file can
grow, refer to itself or name a type.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

MAX_BYTES, MAX_DEPTH, MAX_NODES = 64 * 1024, 16, 5_000
MAX_DIGITS = 40  # characters of a number; Python's own conversion is quadratic, and fails beyond 4,300
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # escapes can write them


class YamlFaults(Exception):
    """The text cannot be read; `faults` are all that were found, each with its place."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass
class Node:
    """A value and its place in words: of its key in a mapping, its own in a sequence."""

    where: str
    value: Any

    def plain(self) -> Any:
        """The value without places; sequences are tuples, as settings have them."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return tuple(node.plain() for node in self.value) if isinstance(self.value, list) else self.value

    def at(self, location: tuple[Any, ...]) -> "Node":
        """The deepest node on the way to `location` that there is."""
        node = self
        for part in location:
            children = dict(enumerate(node.value)) if isinstance(node.value, list) else node.value
            if isinstance(children, dict) and part in children:
                node = children[part]
        return node


def read(content: bytes, where: Callable[[int], str]) -> Node:
    """Read one document.

    Args:
        where: the place of a line, counted from 1, in words.

    Raises:
        YamlFaults: it is not UTF-8, no YAML, too large, or has anchors, aliases, tags, or a key twice.
    """
    faults: list[str] = []
    line = 1
    try:
        if len(content) > MAX_BYTES:
            raise YAMLError(f"{len(content):,} bytes; {MAX_BYTES:,} are read at most")
        text = content.decode("utf-8-sig")
        depth = number = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            line = event.start_mark.line + 1
            number += isinstance(event, NodeEvent)
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH + 1 or number > MAX_NODES:
                limit = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"more than {MAX_NODES:,} values"
                raise YAMLError(limit)
            faults += (f"{where(line)}: {fault}" for fault in _faults(event))
        node = None if faults else YAML(typ="safe", pure=True).compose(text)
        tree = Node(where(1), None) if node is None else _tree(node, where, where(node.start_mark.line + 1), faults)
    except (YAMLError, ArithmeticError, LookupError, ValueError) as error:  # ruamel does not check every escape
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        position = getattr(error, "position", getattr(error, "start", None))
        line = mark.line + 1 if mark else line if position is None else content.count(b"\n", 0, position) + 1
        said = [part for name in ("context", "problem") if (part := getattr(error, name, None))]
        faults.append(f"{where(line)}: not valid YAML: {', '.join(said) or str(error).splitlines()[0]}")
    if faults:
        raise YamlFaults(faults)
    return tree


def _faults(event: Any) -> list[str]:
    """What a recipe must not have."""
    if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
        return ["a document of another version than YAML 1.2"]
    if isinstance(event, AliasEvent):
        return [f"*{event.anchor} is an alias; write the value out"]
    anchor, tag, text = (getattr(event, name, None) for name in ("anchor", "tag", "value"))
    found = [] if anchor is None else [f"&{anchor} is an anchor; anchors and aliases are not read"]
    found += [] if tag is None else [f"{tag!r} is a tag; tags are not read"]
    unreadable = text is not None and _NO_TEXT.search(text)
    return found + ([f"{text!r} holds NUL or half a character, which no name or path can"] if unreadable else [])


def _tree(node: Any, where: Callable[[int], str], place: str, faults: list[str]) -> Node:
    if isinstance(node, SequenceNode):
        return Node(place, [_tree(item, where, where(item.start_mark.line + 1), faults) for item in node.value])
    if isinstance(node, ScalarNode):
        return Node(place, _value(node, place, faults))
    assert isinstance(node, MappingNode)
    found: dict[str, Node] = {}
    for key, value in node.value:
        here = where(key.start_mark.line + 1)
        if not isinstance(key, ScalarNode):
            faults.append(f"{here}: a key is a mapping or a sequence; keys are text")
        elif key.value in found:
            faults.append(f"{here}: key {key.value!r} appears twice")
        else:
            found[key.value] = _tree(value, where, here, faults)  # a key is its text, as in JSON
    return Node(place, found)


def _value(node: Any, place: str, faults: list[str]) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
        faults.append(f"{place}: a number of {len(node.value):,} characters; {MAX_DIGITS} are read at most")
        return None
    if kind not in ("null", "bool", "int", "float"):
        return node.value
    value = YAML(typ="safe", pure=True).constructor.construct_object(node)
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value  # in JSON, too, 2.0 is an integer
