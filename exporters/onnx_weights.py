"""The weights of an ONNX graph: where a model's layers are, and how to store them otherwise."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir
from torch import nn

from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.architecture import prunable_layers, weight_matrix

Packed = TypeVar("Packed", bound=PackedLinear)


@dataclass(frozen=True)
class Place:
    """Columns [start, stop) of an initializer [in_features, columns], or a whole one in either orientation."""

    initializer: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def of(self, array: Any) -> Any:
        return array[:, self.start : self.stop]


def find(program: ir.Model, model: nn.Module) -> dict[str, Place]:
    """{layer: its place} of every linear weight, by content: alone, transposed, or side by side in one initializer.

    An initializer of one layer is renamed after it; some exporters number them.
    """
    by_content: dict[bytes, str] = {}
    by_row: dict[bytes, list[tuple[str, Any]]] = {}
    for name, layer in ((n, layer) for block in prunable_layers(model) for n, layer in block.items()):
        weight = weight_matrix(layer).detach().numpy()
        for array in (weight, weight.T):
            by_content.setdefault(_content(array), name)
        by_row.setdefault(_content(weight[0]), []).append((name, weight))
    found: dict[str, Place] = {}
    for value in list(program.graph.initializers.values()):
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        array = value.const_value.numpy()
        whole = by_content.get(_content(array))
        if whole is None:
            found |= _side_by_side(value.name or "", array, by_row)
        elif whole not in found:
            program.graph.initializers.pop(value.name)
            value.name = f"{whole}.weight"
            program.graph.initializers[value.name] = value
            found[whole] = Place(value.name, array.shape, 0, array.shape[1])
    return found


def _side_by_side(name: str, array: Any, by_row: dict[bytes, list[tuple[str, Any]]]) -> dict[str, Place]:
    found, start = {}, 0
    while start < array.shape[1]:
        for layer, weight in by_row.get(_content(array[:, start]), ()):
            stop = start + len(weight)
            if layer not in found and weight.shape[1] == len(array) and np.array_equal(weight.T, array[:, start:stop]):
                found[layer] = Place(name, array.shape, start, stop)
                start = stop
                break
        else:
            return {}
    return found


def _content(array: Any) -> bytes:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).digest()


def stacked(packed: Mapping[str, Packed], places: Mapping[str, Place]) -> dict[str, Packed]:
    """{initializer: the packed weights of its layers, one below the other}."""
    together: dict[str, list[Packed]] = {}
    for layer in sorted((layer for layer in packed if layer in places), key=lambda layer: places[layer].start):
        together.setdefault(places[layer].initializer, []).append(packed[layer])
    return {name: own[0] if len(own) == 1 else own[0].stack(own) for name, own in together.items()}


def initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    assert value.const_value is not None
    value.shape, value.dtype = ir.Shape(value.const_value.shape), value.const_value.dtype
    graph.initializers[name] = value
    return value


def constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """The initializer of that name, made if missing."""
    return graph.initializers.get(name) or initializer(graph, name, array)


def replace(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Put `output` in the place, and under the name, of a node's single output."""
    product = node.outputs[0]
    output.shape, output.type = product.shape, product.type
    product.replace_all_uses_with(output, replace_graph_outputs=product.is_graph_output())
    graph.remove(node, safe=True)
    output.name = product.name


@dataclass(frozen=True)
class Rows:
    """A stored weight [out_features, in_features].

    `multiply` makes the node for x Wᵀ; `read` the nodes that read rows of a Gather in float32, the result last.
    """

    multiply: Callable[[ir.Value], ir.Node]
    read: Callable[[ir.Node], list[ir.Node]]


# Stores an initializer, from its name and its weight [out_features, in_features] in float32; None leaves it.
Store: TypeAlias = Callable[[str, Any], Rows | None]


def use_rows_(program: ir.Model, store: Store) -> None:
    """Multiply by the stored form of all constant matrices instead of MatMul, in place; tied embeddings read it too."""
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
            for gather in [user for value in same for user, _ in value.uses() if user.op_type == "Gather"]:
                _read(graph, gather, made)
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
    """Store the tables of Gathers, in place."""
    graph = program.graph
    for gather in [node for node in graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is None or table.name not in graph.initializers or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.shape or ()) == 2 and len(table.uses()) == 1 and table.const_value is not None:
            made = store(table.name, table.const_value.numpy())
            if made is not None:
                _read(graph, gather, made)
                del graph.initializers[table.name]


def rows_of(gather: ir.Node, table: ir.Value) -> ir.Node:
    return ir.node("Gather", [table, gather.inputs[1]], attributes={"axis": 0})


def widened(node: ir.Node) -> ir.Node:
    return ir.node("Cast", [node.outputs[0]], attributes={"to": ir.DataType.FLOAT})


def _turns(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and tuple(permutation.as_ints()) == (1, 0)


def _read(graph: ir.Graph, gather: ir.Node, rows: Rows) -> None:
    nodes = rows.read(gather)
    graph.insert_before(gather, nodes)
    replace(graph, gather, nodes[-1].outputs[0])
