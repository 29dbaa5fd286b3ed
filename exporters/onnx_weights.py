"""The weights of an ONNX graph: the places of a model's layers, and other forms to store them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape
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
    """{layer: its place} of every linear weight, by content, in either orientation; its initializer gets its name."""
    by_row: dict[bytes, dict[str, Any]] = {}
    for name, layer in ((n, layer) for block in prunable_layers(model) for n, layer in block.items()):
        weight = weight_matrix(layer).detach().numpy()
        by_row.setdefault(weight[0].tobytes(), {})[name] = weight
    found: dict[str, Place] = {}
    for value in list(program.graph.initializers.values()):
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        array = value.const_value.numpy()
        for rows in (array.T, array):
            same = by_row.get(rows[0].tobytes(), {})
            known = next((name for name in same if np.array_equal(same[name], rows)), None)
            if known is not None:
                del same[known]
                program.graph.initializers.pop(value.name)
                value.name = renamed = f"{known}.weight"
                program.graph.initializers[renamed] = value
                found[known] = Place(renamed, array.shape, 0, array.shape[1])
                break
    return found


def stacked(packed: Mapping[str, Packed], places: Mapping[str, Place]) -> dict[str, Packed]:
    """{initializer: the packed weights of its layers, one below the other}."""
    together: dict[str, list[Packed]] = {}
    for layer in sorted((layer for layer in packed if layer in places), key=lambda layer: places[layer].start):
        together.setdefault(places[layer].initializer, []).append(packed[layer])
    return {name: own[0] if len(own) == 1 else own[0].stack(own) for name, own in together.items()}


def initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    return Tape(graph).initializer(ir.tensor(array, name=name))


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

    `multiply` makes the node for x Wᵀ; `read` records the nodes that read rows of a Gather in float32.
    """

    multiply: Callable[[ir.Value], ir.Node]
    read: Callable[[Tape, ir.Node], ir.Value]


# Stores an initializer, from its name and what makes its weight [out_features, in_features]; None leaves it.
Store: TypeAlias = Callable[[str, Callable[[], Any]], Rows | None]


def use_rows_(program: ir.Model, store: Store, embeddings: bool) -> None:
    """Multiply by the stored form of all constant matrices instead of MatMul, in place; tied embeddings read it too.

    With `embeddings`, the tables of other embeddings are stored as well.
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
            tensor = before.const_value
            if len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
                continue
            made = store(before.name, partial(_array, tensor, turned=before is weight))
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
    if embeddings:
        _store_embeddings_(graph, store)


def _array(tensor: Any, turned: bool) -> Any:
    return tensor.numpy().T if turned else tensor.numpy()


def _store_embeddings_(graph: ir.Graph, store: Store) -> None:
    for gather in [node for node in graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is None or table.name not in graph.initializers or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.shape or ()) == 2 and len(table.uses()) == 1 and table.const_value is not None:
            made = store(table.name, table.const_value.numpy)
            if made is not None:
                _read(graph, gather, made)
                del graph.initializers[table.name]


def rows_of(tape: Tape, gather: ir.Node, table: ir.Value) -> ir.Value:
    return tape.op("Gather", [table, gather.inputs[1]], {"axis": 0})


def widened(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("Cast", [value], {"to": ir.DataType.FLOAT})


def _turns(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and tuple(permutation.as_ints()) == (1, 0)


def _read(graph: ir.Graph, gather: ir.Node, rows: Rows) -> None:
    tape = Tape()
    found = rows.read(tape, gather)
    graph.insert_before(gather, tape.nodes)
    replace(graph, gather, found)
