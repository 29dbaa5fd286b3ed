"""Ways to spoil a file, drawn by hypothesis: its bytes, its JSON, its safetensors header, or what it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import torch
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file

Draw = Callable[[st.SearchStrategy[Any]], Any]

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd",
    "demo", "\n", "\x1b[31m", "[/red]", "$x$", "\ud800", "a" * 5000, [], [[]], {}, {"a": {}}, [0] * 100,
]  # fmt: skip
EXTREMES = [1e-8, -1e-8, 1e-42, 1e30, 3e38, float("nan"), float("inf"), float("-inf"), -0.0]
ODD_CELLS: list[Any] = ["a" * 10_000, None, b"\xff", 1, 1e400, ["a"], {"text": "a"}, True, ""]
ODD_TEXTS = ["", "\x00", "null", "{", "[" * 3000, "9" * 5000, "\ufeff", "---\n", "&a [*a]", "!!int x", "- " * 3000]


def spoil(path: Path, draw: Draw) -> str:
    """Change the file in one way; what was done, in words."""
    text = [_text] * 2
    by_suffix = {
        ".json": [_json] * 4,
        ".safetensors": [_header] * 2 + [_tensor] * 3,
        ".parquet": [_table] * 4,
        **dict.fromkeys((".jsonl", ".txt", ".yaml", ".html", ".md", ".xml"), text),
    }
    way = draw(st.sampled_from([_bytes, _bytes, _nature, *by_suffix.get(path.suffix, ())]))
    return f"{path.name}: {way(path, draw)}"


def _bytes(path: Path, draw: Draw) -> str:
    data, few = path.read_bytes(), draw(st.integers(1, 64))
    place = draw(st.integers(0, len(data)))
    before, after = data[:place], data[place:]
    changed = {
        "flip": bytes(byte ^ 1 << few % 8 for byte in after[:1]) + after[1:],
        "cut": b"",
        "insert": draw(st.binary(max_size=16)) + after,
        "delete": after[few:],
        "zero": bytes(len(after[:few])) + after[few:],
    }
    what = draw(st.sampled_from(sorted(changed)))
    path.write_bytes(before + changed[what])
    return f"{what} at byte {place}"


def _nature(path: Path, draw: Draw) -> str:
    links = {"link out": "/etc/hostname", "broken link": "nowhere", "loop": path, "device": "/dev/zero"}
    what = draw(st.sampled_from(["missing", "folder", "pipe", *links]))
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what in links:
        path.symlink_to(links[what])
    return what


def _text(path: Path, draw: Draw) -> str:
    lines = path.read_text().split("\n")
    place = draw(st.integers(0, len(lines) - 1))
    odd = draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=40) | st.sampled_from(lines))
    key, colon, _ = lines[place].partition(":")
    lines[place] = f"{key}: {odd}" if colon and draw(st.booleans()) else odd
    path.write_text("\n".join(lines), errors="replace")
    return f"line {place + 1} is {odd[:40]!r}"


def _json(path: Path, draw: Draw) -> str:
    content, said = _odd_json(json.loads(path.read_text()), draw)
    path.write_text(json.dumps(content))
    return said


def _odd_json(content: Any, draw: Draw) -> tuple[Any, str]:
    """The content with one value changed, removed or renamed, and what was done."""
    where: list[str] = []
    place = content
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(min(len(place), 50)))
        key = draw(st.sampled_from(keys))
        where.append(str(key))
        if not isinstance(place[key], dict | list) or draw(st.integers(0, 3)) == 0:
            if isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
                value = place.pop(key)
                if draw(st.booleans()):
                    place[draw(st.text(max_size=10))] = value
                return content, f"without {'.'.join(where)}"
            place[key] = draw(st.sampled_from(ODD_VALUES) | st.sampled_from(keys))
            return content, f"{'.'.join(where)} = {str(place[key])[:40]!r}"
        place = place[key]
    return draw(st.sampled_from(ODD_VALUES)), "another top level"


def _header(path: Path, draw: Draw) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content, said = _odd_json(json.loads(data[8 : 8 + length]), draw)
    header = json.dumps(content).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return f"header: {said}"


def _tensor(path: Path, draw: Draw) -> str:
    """One tensor of another shape, dtype or content, in a file that is sound by itself."""
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    dtype = draw(st.sampled_from([torch.float64, torch.int8, torch.bool, torch.bfloat16]))
    raw = tensor.view(-1).view(torch.uint8)
    noise = torch.randint(0, 256, raw.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    changed = {
        "short": tensor[: len(tensor) // 2].clone(),
        "long": torch.cat([tensor, tensor]),
        "dtype": tensor.to(dtype),
        "ones": torch.full_like(tensor, 255 if tensor.dtype == torch.uint8 else -1),
        "flat": tensor.reshape(-1),
        "random": noise.to(torch.uint8).view(tensor.dtype).view(tensor.shape),
    }
    what = draw(st.sampled_from(["missing", *changed]))
    if what in changed:
        tensors[name] = changed[what]
    save_file(tensors, path, metadata={"format": "pt"})
    return f"tensor {name}: {what}"


def extreme(path: Path, draw: Draw) -> str:
    """One weight, row, column or all of a tensor become a number that few models hold."""
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    value, where = draw(st.sampled_from(EXTREMES)), draw(st.sampled_from(["all", "one", "row", "column"]))
    tensor = tensors[name]
    {"all": tensor, "one": tensor.view(-1)[:1], "row": tensor[:1], "column": tensor[..., :1]}[where].fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name}: {where} of {name} = {value}"


def _table(path: Path, draw: Draw) -> str:
    """Another column in a table, in a file that is sound by itself."""
    table = parquet.read_table(path)
    name, value = draw(st.sampled_from(["text", "label", "score", "image", "", "\n"])), draw(st.sampled_from(ODD_CELLS))
    column = pyarrow.array([value] * len(table))
    if draw(st.booleans()):
        table = pyarrow.table({name: column})
    else:
        table = pyarrow.Table.from_arrays([*table.columns, column], [*table.column_names, name])
    parquet.write_table(table[: draw(st.integers(0, len(table)))], path)
    return f"columns {table.column_names}, {name!r} of {str(value)[:40]}"
