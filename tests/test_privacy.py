"""No test reaches into private parts of a room that it does not belong to."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def reached_into(code: str, own: str) -> list[str]:
    """The private names of other rooms that a file of tests uses, as `room.name`."""
    tree = ast.parse(code)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    paths = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    rooms = {name: path.split(".")[1] for name, path in paths.items() if path.startswith("gblm_compress.")}
    text = ast.unparse(tree)  # with quotes of one kind
    used = re.findall(r"\b(\w+)\.(_[a-z]\w*)", text) + re.findall(r"\.setattr\((\w+), '(_[a-z]\w*)'", text)
    used += [(name, name) for name in rooms if re.match("_[a-z]", name)]
    return [f"{rooms[name]}.{private}" for name, private in used if rooms.get(name, own) != own]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_private_names_are_those_of_the_own_room(path: Path) -> None:
    assert not reached_into(path.read_text(), path.parent.name)
