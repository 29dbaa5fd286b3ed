"""No test reaches into private parts of a room that it does not belong to."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def reached_into(path: Path) -> list[str]:
    """The private names of other rooms that a file of tests uses, as `room.name`."""
    tree, own = ast.parse(path.read_text()), path.parent.name
    rooms: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gblm_compress"):
            for alias in node.names:
                room = [*f"{node.module}.{alias.name}".split("."), ""][1]
                rooms[alias.asname or alias.name] = room
                if alias.name.startswith("_") and room != own:
                    found.append(f"{room}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target, name = node.value.id, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr" and len(node.args) > 1:
            first, second = node.args[:2]
            if not (isinstance(first, ast.Name) and isinstance(second, ast.Constant)):
                continue
            target, name = first.id, str(second.value)
        else:
            continue
        if name.startswith("_") and not name.startswith("__") and rooms.get(target, own) != own:
            found.append(f"{rooms[target]}.{name}")
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_private_names_are_those_of_the_own_room(path: Path) -> None:
    assert not reached_into(path)


def test_what_reaches_into_another_room_is_found(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "test_x.py"
    path.parent.mkdir()
    path.write_text(
        "from gblm_compress.pruning import stage\nfrom gblm_compress.runs import job\n"
        "from gblm_compress.layouts.packed import _hidden\n"
        "stage._save()\njob._path()\nmonkeypatch.setattr(stage, '_walk', None)\n"
    )
    assert sorted(reached_into(path)) == ["layouts._hidden", "pruning._save", "pruning._walk"]
