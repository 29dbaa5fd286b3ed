"""Tables of rotary embeddings as the operators that make them, so that a folder does not hold what its runtime can
calculate: 8 bytes for every position and pair of channels, 34 MB of a Llama with 131,072 positions and heads of 64.

ONNX Runtime folds the operators when it loads the graph, so that the session holds the tables as before.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from gblm_compress.exporters.onnx_bitmask import initializer

TABLES = {"cos_cache": "Cos", "sin_cache": "Sin"}
"""The beginnings of the tables' names, and the operators that make them."""

_ROUNDINGS = 4
"""By how many roundings in float32 an angle may differ: other programs take powers in another way."""


def calculate_rotations_(program: ir.Model, frequencies: Iterable[Any]) -> None:
    """Replace tables of cosines and sines of position times frequency, in place; other tables stay.

    Args:
        frequencies: float32 [pairs] each, in radians a position, which the model may turn its channels by.
    """
    graph = program.graph
    nodes: list[ir.Node] = []
    angles: dict[tuple[int, bytes], ir.Value] = {}
    known = list(frequencies)

    def node(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made = ir.node(operator, inputs, attributes=attributes or None)
        nodes.append(made)
        return made.outputs[0]

    def constant(name: str, array: Any) -> ir.Value:
        return graph.initializers.get(name) or initializer(graph, name, array)

    def angles_of(positions: int, turns: Any) -> ir.Value:
        key = positions, turns.tobytes()
        if key not in angles:
            zero, one = (constant(f"rotations.{number}", np.float32(number)) for number in (0, 1))
            end = constant(f"rotations.{positions}", np.float32(positions))
            column = node("Unsqueeze", node("Range", zero, end, one), constant("rotations.axis", np.array([1])))
            angles[key] = node("Mul", column, initializer(graph, f"rotations.turns.{len(angles)}", turns))
        return angles[key]

    for table in list(graph.initializers.values()):
        operator = next((made_by for start, made_by in TABLES.items() if str(table.name).startswith(start)), None)
        if operator is None or table.const_value is None:
            continue
        stored = table.const_value.numpy()
        turns = next((each for each in known if _makes(stored, operator, each)), None)
        if turns is None:
            continue
        made = node(operator, angles_of(len(stored), turns))
        if table.dtype != ir.DataType.FLOAT:
            made = node("Cast", made, to=table.dtype)
        made.shape, made.dtype = table.shape, table.dtype
        del graph.initializers[str(table.name)]
        table.replace_all_uses_with(made)
        made.name = table.name
    if nodes:
        graph.insert_before(graph[0], nodes)


def _makes(table: Any, operator: str, turns: Any) -> bool:
    """Whether a table [positions, pairs] is what the operator makes of positions times frequencies."""
    if table.ndim != 2 or turns.shape != table.shape[1:]:
        return False
    angles = np.outer(np.arange(len(table), dtype=np.float32), turns)
    expected = {"Cos": np.cos, "Sin": np.sin}[operator](angles)
    allowed = np.finfo(table.dtype).eps + _ROUNDINGS * np.finfo(np.float32).eps * angles
    return bool((np.abs(table - expected) <= allowed).all())
