"""Weights of an ONNX graph in another stored form: what multiplies by them, and what gathers rows of them.

A head that shares its weight with the embedding is stored once, and both read it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from gblm_compress.exporters.onnx_bitmask import replace


@dataclass(frozen=True)
class Rows:
    """A weight [out_features, in_features] in its stored form.

    Attributes:
        multiply: of x, a node that gives x Wᵀ.
        read: of a Gather that reads rows of the weight, the nodes that give them in float32, the result last.
    """

    multiply: Callable[[ir.Value], ir.Node]
    read: Callable[[ir.Node], list[ir.Node]]


Store: TypeAlias = Callable[[str, Any], Rows | None]
"""Gives the stored form of an initializer, from its name and its weight [out_features, in_features] in float32; None
leaves it as it is."""


def use_rows_(program: ir.Model, store: Store) -> None:
    """Multiply by the stored form of all constant matrices instead of MatMul, in place.

    An embedding that shares the weight of the head reads the head's, which has its orientation.
    """
    graph = program.graph
    turned: dict[ir.Value, Rows] = {}
    for matmul in [node for node in graph if node.op_type == "MatMul"]:
        x, weight = matmul.inputs
        assert x is not None and weight is not None
        producer = weight.producer()
        before = producer.inputs[0] if producer is not None and _turns(producer) else weight
        if before is None or before.name not in graph.initializers or before.const_value is None:
            continue
        if before not in turned:
            array = before.const_value.numpy()
            if array.ndim != 2 or array.dtype != np.float32:
                continue
            made = store(before.name, array.T if before is weight else array)
            if made is None:
                continue
            turned[before] = made
            same = [user.outputs[0] for user, _ in before.uses() if _turns(user)] if before is weight else [before]
            for gather, _ in [use for value in same for use in value.uses() if use[0].op_type == "Gather"]:
                _gather(graph, gather, made)
        node = turned[before].multiply(x)
        node.name = matmul.name
        graph.insert_before(matmul, node)
        replace(graph, matmul, node.outputs[0])
    for before in turned:
        for user in [user for user, _ in before.uses() if _turns(user) and not user.outputs[0].uses()]:
            graph.remove(user, safe=True)
        if not before.uses():
            del graph.initializers[before.name]


def store_embeddings_(program: ir.Model, store: Store) -> None:
    """Store what rows are gathered from as other weights are, in place."""
    graph = program.graph
    for gather in [node for node in graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is None or table.name not in graph.initializers or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.shape or ()) == 2 and len(table.uses()) == 1 and table.const_value is not None:
            made = store(table.name, table.const_value.numpy())
            if made is not None:
                _gather(graph, gather, made)
                del graph.initializers[table.name]


def rows_of(gather: ir.Node, table: ir.Value) -> ir.Node:
    """The Gather, of a table's rows."""
    return ir.node("Gather", [table, gather.inputs[1]], attributes={"axis": 0})


def widened(node: ir.Node) -> ir.Node:
    """What a node gives, in float32."""
    return ir.node("Cast", [node.outputs[0]], attributes={"to": ir.DataType.FLOAT})


def _turns(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and tuple(permutation.as_ints()) == (1, 0)


def _gather(graph: ir.Graph, gather: ir.Node, rows: Rows) -> None:
    """Put what reads the stored rows in the place of a Gather."""
    nodes = rows.read(gather)
    graph.insert_before(gather, nodes)
    replace(graph, gather, nodes[-1].outputs[0])
