"""YAML 1.2 as plain values with their positions. This is the only module that knows YAML.

What a recipe needs is what JSON can say: mappings with text as keys, sequences, text, numbers, booleans and null.
Anchors, aliases and tags are refused, so that nothing in a file can grow, refer to itself or name a type; size, depth
and number of values are limited while the parser is still reading.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_NODES = 5_000
MAX_DIGITS = 40  # characters of a number; Python's own conversion is quadratic, and fails beyond 4,300

# The core schema of YAML 1.2 (chapter 10.3.2).
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # escapes can write them
_BASES = {"0o": 8, "0x": 16}


class YamlFaults(Exception):
    """The text is not what can be read here; `faults` are all that were found, each with its place."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass
class Node:
    """A value and where it stands.

    Attributes:
        where: its place in words: that of its key in a mapping, its own in a sequence.
        value: None, a boolean, a number, text, {key: node} or [node].
    """

    where: str
    value: Any

    def plain(self) -> Any:
        """The value without places; sequences are tuples, as settings have them."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return tuple(node.plain() for node in self.value)
        return self.value

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
        YamlFaults: it is not UTF-8, no YAML, or uses what is not read here.
    """
    return _Reader(where).read(content)


class _Reader:
    def __init__(self, where: Callable[[int], str]) -> None:
        self.where = where
        self.faults: list[str] = []
        self.nodes = 0

    def read(self, content: bytes) -> Node:
        if len(content) > MAX_BYTES:
            self._stop(1, f"{len(content):,} bytes; {MAX_BYTES:,} are read at most")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._stop(content.count(b"\n", 0, error.start) + 1, f"not UTF-8: byte {content[error.start]:#04x}")
        try:
            node = self._document(YAML(typ="safe", pure=True).parse(text))
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._stop(line, f"not valid YAML: character {error.character:#04x} is not allowed")
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            self._stop(mark.line + 1 if mark else 1, f"not valid YAML: {reason}")
        except (YAMLError, ArithmeticError, LookupError, ValueError) as error:  # ruamel does not check every escape
            self._stop(1, f"not valid YAML: {error}")
        if self.faults:
            raise YamlFaults(self.faults)
        return node

    def _document(self, events: Iterator[Any]) -> Node:
        node = None
        for event in events:
            if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
                self._stop(event.start_mark.line + 1, "a document of another version than YAML 1.2")
            elif isinstance(event, NodeEvent):
                if node is not None:
                    self._stop(event.start_mark.line + 1, "a second document; one is read")
                node = self._node(events, event, self.where(event.start_mark.line + 1), 0)
        return node or Node(self.where(1), None)

    def _node(self, events: Iterator[Any], event: Any, where: str, depth: int) -> Node:
        line = event.start_mark.line + 1
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._stop(line, f"more than {MAX_NODES:,} values")
        if depth > MAX_DEPTH:
            self._stop(line, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, AliasEvent):
            self._fault(line, f"*{event.anchor} is an alias; write the value out")
            return Node(where, None)
        if event.anchor is not None:
            self._fault(line, f"&{event.anchor} is an anchor; anchors and aliases are not read")
        if event.tag is not None:
            self._fault(line, f"{event.tag!r} is a tag; tags are not read")
        if isinstance(event, ScalarEvent):
            if _NO_TEXT.search(event.value):
                self._fault(line, f"{event.value!r} holds NUL or half a character, which no name or path can")
            return Node(where, event.value if event.style else self._scalar(event.value, line))
        if isinstance(event, SequenceStartEvent):
            return Node(where, self._sequence(events, depth))
        assert isinstance(event, MappingStartEvent)
        return Node(where, self._mapping(events, depth))

    def _sequence(self, events: Iterator[Any], depth: int) -> list[Node]:
        nodes: list[Node] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            nodes.append(self._node(events, event, self.where(event.start_mark.line + 1), depth + 1))
        return nodes

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            line = event.start_mark.line + 1
            key = self._node(events, event, self.where(line), depth + 1)
            name = event.value if isinstance(event, ScalarEvent) else ""  # a key is its text, as in JSON
            if isinstance(key.value, dict | list):
                self._fault(line, "a key is a mapping or a sequence; keys are text")
            elif name in nodes:
                self._fault(line, f"key {name!r} appears twice")
            nodes[name] = self._node(events, next(events), self.where(line), depth + 1)
        return nodes

    def _scalar(self, text: str, line: int) -> Any:
        """What text without quotes stands for."""
        if text in _NULLS:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        is_integer = _INTEGER.fullmatch(text)
        if not is_integer and not _FLOAT.fullmatch(text):
            return text
        if len(text) > MAX_DIGITS:
            self._fault(line, f"a number of {len(text):,} characters; {MAX_DIGITS} are read at most")
            return None
        if is_integer:
            return int(text[2:], _BASES[text[:2]]) if text[:2] in _BASES else int(text)
        number = float(text.replace(".", "") if text[-1].isalpha() else text)  # Python has no dot before inf and nan
        return int(number) if number.is_integer() and abs(number) < 2**53 else number  # in JSON, too, 2.0 is an integer

    def _fault(self, line: int, message: str) -> None:
        self.faults.append(f"{self.where(line)}: {message}")

    def _stop(self, line: int, message: str) -> NoReturn:
        self._fault(line, message)
        raise YamlFaults(self.faults)
