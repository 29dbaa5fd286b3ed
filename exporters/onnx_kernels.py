"""Products on this package's operators for ONNX Runtime (kernels/onnxruntime_op.c), in the place of MatMuls.

Pruned weights are multiplied by gblm.BitmaskLinear, or as levels of 8 or 4 bits by gblm.QuantisedLinear; weights
without zeros by gblm.DenseLinear, and the head as levels of 8 bits where others are levels too. Activations stay in
float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.exporters.onnx_bitmask import LEVELS, MASK, ROWS, SCALES, STARTS, VALUES, initializer, replace
from gblm_compress.kernels.masks import WORD, row_starts
from gblm_compress.layouts.bitmask import pack
from gblm_compress.layouts.quantised import QuantisedLinear

DOMAIN, VERSION = "gblm", 3
OPERATOR, DENSE_OPERATOR, QUANTISED_OPERATOR = "BitmaskLinear", "DenseLinear", "QuantisedLinear"
MAX_WEIGHTS = 8  # that one node multiplies by


@dataclass(frozen=True)
class _Rows:
    """A weight [out_features, in_features] as an operator and as an embedding reads it.

    Attributes:
        inputs: of the operator, after x.
        read: of a Gather that reads rows of the weight, the nodes that give them in float32, the result last.
    """

    operator: str
    inputs: list[ir.Value]
    read: Callable[[ir.Node], list[ir.Node]]


def use_kernels_(
    program: ir.Model,
    names: Sequence[str],
    *,
    half: bool = False,
    packed: Mapping[str, QuantisedLinear] | None = None,
    tables: Sequence[QuantisedLinear] = (),
) -> None:
    """Multiply by the named initializers [in_features, out_features] with an operator for zeros instead of MatMul, and
    by all others with DenseLinear, in place.

    MatMuls of the same input become one node, at the place of the first. An embedding that shares the weight of the
    head reads the head's, which has its orientation.

    Args:
        half: store all these weights, and the embedding, in float16; they must be its numbers.
        packed: {initializer: its weight as levels}, for all that are named or none.
        tables: the weights of head and embedding as levels; they take the place of initializers with their numbers.

    Raises:
        ModelError: a named weight is not used by MatMuls alone, or its in_features is not a multiple of 64.
    """
    stored = np.float16 if half else np.float32

    def parts(name: str, weight: Any) -> dict[str, Any]:
        if packed is not None:
            return quantised_parts(packed[name])
        mask, values = pack(torch.from_numpy(_as_stored(name, weight, stored)))
        return {MASK: mask.numpy(), VALUES: values.numpy(), STARTS: row_starts(mask).numpy()}

    def rows(name: str, weight: Any) -> _Rows:
        for table in tables:
            if np.array_equal(table.dense_weight().numpy(), weight):
                return _quantised_rows(program.graph, name, quantised_parts(table))
        return _stored_rows(initializer(program.graph, f"{name}{ROWS}", _as_stored(name, weight, stored)))

    _use_packed(program, names, OPERATOR if packed is None else QUANTISED_OPERATOR, parts)
    _use_dense(program, rows)
    if half or tables:
        _store_embeddings(program, rows)
    program.opset_imports[DOMAIN] = VERSION


def quantised_parts(layer: QuantisedLinear) -> dict[str, Any]:
    """{suffix: array}: the inputs of gblm.QuantisedLinear for a weight, in order."""
    stored = dict(layer.named_buffers())
    nothing = torch.empty(0, dtype=torch.int8)
    mask = stored.get("mask", torch.empty(0, 0, dtype=torch.int64))
    values, levels = stored["values"], stored.get("levels", nothing).flatten()
    scales = layer.scales.view(torch.float16)
    return {MASK: mask.numpy(), VALUES: values.numpy(), SCALES: scales.numpy(), LEVELS: levels.numpy()}


def _use_packed(
    program: ir.Model, names: Sequence[str], operator: str, parts: Callable[[str, Any], dict[str, Any]]
) -> None:
    """Args:
    parts: of an initializer's name and its weight [rows, columns], {suffix: array}: the inputs of the operator.
    """
    graph = program.graph
    inputs: dict[str, list[ir.Value]] = {}
    same_input: dict[ir.Value, list[ir.Node]] = {}
    for name in names:
        dense = graph.initializers[name]
        assert dense.const_value is not None
        weight = dense.const_value.numpy().T
        used_by = {f"{node.op_type} input {index}" for node, index in dense.uses()}
        if used_by != {"MatMul input 1"} or weight.shape[1] % WORD:
            raise ModelError(
                f"{name}: {operator} takes the place of a MatMul whose in_features is a multiple of {WORD}; this "
                f"weight has in_features={weight.shape[1]} and is used by {', '.join(sorted(used_by))}. Export with "
                "--sparse"
            )
        made = parts(name, weight)
        inputs[name] = [initializer(graph, name + suffix, array) for suffix, array in made.items()]
        for matmul, _ in dense.uses():
            same_input.setdefault(matmul.inputs[0], []).append(matmul)
    order = {node: number for number, node in enumerate(graph)}
    for x, matmuls in same_input.items():
        matmuls.sort(key=order.__getitem__)
        for first in range(0, len(matmuls), MAX_WEIGHTS):
            group = matmuls[first : first + MAX_WEIGHTS]
            weights = [value for matmul in group for value in inputs[matmul.inputs[1].name]]
            node = ir.Node(DOMAIN, operator, [x, *weights], num_outputs=len(group), name=group[0].name)
            graph.insert_before(group[0], node)
            for matmul, output in zip(group, node.outputs, strict=True):
                replace(graph, matmul, output)
    for name in names:
        del graph.initializers[name]


def _use_dense(program: ir.Model, rows: Callable[[str, Any], _Rows]) -> None:
    """Args:
    rows: of an initializer's name and its weight [out_features, in_features].
    """
    graph = program.graph
    turned: dict[ir.Value, _Rows] = {}
    for matmul in [node for node in graph if node.op_type == "MatMul"]:
        weight = matmul.inputs[1]
        producer = weight.producer()
        before = producer.inputs[0] if producer is not None and _turns(producer) else weight
        if before.name not in graph.initializers or before.const_value is None or len(before.shape or ()) != 2:
            continue
        if before not in turned:
            array = before.const_value.numpy()
            array = array.T if before is weight else array
            if array.shape[1] % WORD or array.dtype != np.float32:
                continue
            turned[before] = rows(before.name, array)
            same = [user.outputs[0] for user, _ in before.uses() if _turns(user)] if before is weight else [before]
            for gather, _ in [use for value in same for use in value.uses() if use[0].op_type == "Gather"]:
                _gather(graph, gather, turned[before])
        made = turned[before]
        node = ir.Node(DOMAIN, made.operator, [matmul.inputs[0], *made.inputs], name=matmul.name)
        graph.insert_before(matmul, node)
        replace(graph, matmul, node.outputs[0])
    for before in turned:
        for user in [user for user, _ in before.uses() if _turns(user) and not user.outputs[0].uses()]:
            graph.remove(user, safe=True)
        if not before.uses():
            del graph.initializers[before.name]


def _turns(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and tuple(permutation.as_ints()) == (1, 0)


def _stored_rows(rows: ir.Value) -> _Rows:
    def read(gather: ir.Node) -> list[ir.Node]:
        found = _rows_of(gather, rows)
        return [found] if rows.dtype == ir.DataType.FLOAT else [found, _widened(found)]

    return _Rows(DENSE_OPERATOR, [rows], read)


def _quantised_rows(graph: ir.Graph, name: str, parts: dict[str, Any]) -> _Rows:
    made = {suffix: initializer(graph, name + suffix, array) for suffix, array in parts.items()}

    def read(gather: ir.Node) -> list[ir.Node]:
        levels, scales = (_rows_of(gather, made[suffix]) for suffix in (VALUES, SCALES))
        wide = [_widened(levels), _widened(scales)]
        return [levels, scales, *wide, ir.node("Mul", [node.outputs[0] for node in wide])]

    return _Rows(QUANTISED_OPERATOR, list(made.values()), read)


def _rows_of(gather: ir.Node, table: ir.Value) -> ir.Node:
    return ir.node("Gather", [table, gather.inputs[1]], attributes={"axis": 0})


def _widened(node: ir.Node) -> ir.Node:
    return ir.node("Cast", [node.outputs[0]], attributes={"to": ir.DataType.FLOAT})


def _gather(graph: ir.Graph, gather: ir.Node, rows: _Rows) -> None:
    """Put what reads the stored rows in the place of a Gather."""
    nodes = rows.read(gather)
    graph.insert_before(gather, nodes)
    replace(graph, gather, nodes[-1].outputs[0])


def _store_embeddings(program: ir.Model, rows: Callable[[str, Any], _Rows]) -> None:
    """Store what rows are gathered from as other weights are."""
    graph = program.graph
    for gather in [node for node in graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is None or table.name not in graph.initializers or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.shape or ()) == 2 and len(table.uses()) == 1 and table.const_value is not None:
            _gather(graph, gather, rows(table.name, table.const_value.numpy()))
            del graph.initializers[table.name]


def _as_stored(name: str, array: Any, dtype: Any) -> Any:
    """A copy of the array in another dtype, which must lose nothing."""
    made = array.astype(dtype, order="C", copy=True)
    if not np.array_equal(made.astype(array.dtype), array):
        raise VerificationError(f"{name}: its numbers are not those of {np.dtype(dtype).name}")
    return made
