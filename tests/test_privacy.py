"""No test reaches into private parts of a room that it does not belong to."""

import ast
import re
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
                if alias.name.startswith("_") and alias.name != "__version__" and room != own:
                    found.append(f"{room}.{alias.name}")
    text = ast.unparse(tree)  # with quotes of one kind
    for name, room in rooms.items():
        used = re.findall(rf"\b{name}\.(_[a-z]\w*)|\.setattr\({name}, '(_[a-z]\w*)'", text) if room != own else []
        found += [f"{room}.{''.join(private)}" for private in used]
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
