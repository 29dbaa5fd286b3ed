"""Weights of an ONNX graph for this package's operators, which multiply by them as they are packed.

gblm.BitmaskLinear is for pruned weights, gblm.QuantisedLinear for levels of 8 or 4 bits, gblm.DenseLinear for the rest
(kernels/onnxruntime_op.c). Activations stay in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.exporters.onnx_weights import Rows, initializer, replace, rows_of, use_rows_, widened
from gblm_compress.kernels.masks import WORD, row_starts
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import PackedLinear

DOMAIN, VERSION = "gblm", 3
MASK, VALUES, STARTS, SCALES, LEVELS = ".mask", ".nonzeros", ".starts", ".scales", ".levels"
ROWS = ".rows"  # suffix of a weight that is stored as [out_features, in_features]
MAX_WEIGHTS = 8  # of one node


def use_kernels_(
    program: ir.Model,
    names: Sequence[str],
    *,
    half: bool = False,
    packed: Mapping[str, PackedLinear] | None = None,
    tables: Sequence[PackedLinear] = (),
) -> None:
    """Replace MatMuls by this package's operators, in place: for zeros with the named initializers [in_features,
    out_features], DenseLinear with all others. MatMuls of one input become one node.

    Args:
        half: store these weights and the embedding in float16, which must lose nothing.
        packed: {initializer: its weight as levels}, for all names or none.
        tables: the levels of head and embedding, which replace initializers of the same numbers.
    """
    stored = np.float16 if half else np.float32

    def parts(name: str, dense: Any) -> dict[str, Any]:
        if packed is not None:
            return quantised_parts(packed[name])
        held = LAYOUTS["bitmask"].kind.pack(torch.from_numpy(_as_stored(name, dense.numpy().T, stored)))
        starts = row_starts(held["mask"]).numpy()
        return {MASK: held["mask"].numpy(), VALUES: held["values"].numpy(), STARTS: starts}

    def store(name: str, dense: Callable[[], Any]) -> Rows | None:
        weight = dense()
        for table in tables:
            if np.array_equal(table.dense_weight().numpy(), weight):
                return _quantised_rows(program.graph, name, quantised_parts(table))
        if weight.shape[1] % WORD:
            return None
        return _dense_rows(initializer(program.graph, f"{name}{ROWS}", _as_stored(name, weight, stored)))

    _use_packed(program, names, "BitmaskLinear" if packed is None else "QuantisedLinear", parts)
    use_rows_(program, store, embeddings=half or bool(tables))
    program.opset_imports[DOMAIN] = VERSION


def quantised_parts(layer: PackedLinear) -> dict[str, Any]:
    """{suffix: array}: the weight as inputs of gblm.QuantisedLinear, in order."""
    stored = layer.held
    mask = stored.get("mask", torch.empty(0, 0, dtype=torch.int64))
    levels = stored.get("levels", torch.empty(0, dtype=torch.int8)).flatten()
    tensors = {MASK: mask, VALUES: stored["values"], SCALES: stored["scales"].view(torch.float16), LEVELS: levels}
    return {suffix: tensor.numpy() for suffix, tensor in tensors.items()}


def _use_packed(
    program: ir.Model, names: Sequence[str], operator: str, parts: Callable[[str, Any], dict[str, Any]]
) -> None:
    """`parts` makes the operator's inputs, {suffix: array}, of a name and its dense tensor [columns, rows]."""
    graph = program.graph
    inputs: dict[str, list[ir.Value]] = {}
    same_input: dict[ir.Value, list[ir.Node]] = {}
    for name in names:
        dense = graph.initializers[name]
        assert dense.const_value is not None
        columns, used_by = dense.const_value.shape[0], {f"{node.op_type} input {index}" for node, index in dense.uses()}
        if used_by != {"MatMul input 1"} or columns % WORD:
            raise ModelError(
                f"{name}: {operator} replaces only a MatMul whose in_features is a multiple of {WORD}; this "
                f"weight has in_features={columns} and is used by {', '.join(sorted(used_by))}. Export without "
                "--kernels"
            )
        made = parts(name, dense.const_value)
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


def _dense_rows(rows: ir.Value) -> Rows:
    def multiply(x: ir.Value) -> ir.Node:
        return ir.Node(DOMAIN, "DenseLinear", [x, rows])

    def read(tape: Tape, gather: ir.Node) -> ir.Value:
        found = rows_of(tape, gather, rows)
        return found if rows.dtype == ir.DataType.FLOAT else widened(tape, found)

    return Rows(multiply, read)


def _quantised_rows(graph: ir.Graph, name: str, parts: dict[str, Any]) -> Rows:
    made = {suffix: initializer(graph, name + suffix, array) for suffix, array in parts.items()}

    def multiply(x: ir.Value) -> ir.Node:
        return ir.Node(DOMAIN, "QuantisedLinear", [x, *made.values()])

    def read(tape: Tape, gather: ir.Node) -> ir.Value:
        levels, scales = (rows_of(tape, gather, made[suffix]) for suffix in (VALUES, SCALES))
        return tape.op("Mul", [widened(tape, levels), widened(tape, scales)])

    return Rows(multiply, read)


def _as_stored(name: str, array: Any, dtype: Any) -> Any:
    """A copy of the array in another dtype, which must lose nothing."""
    made = array.astype(dtype, order="C", copy=True)
    if not np.array_equal(made.astype(array.dtype), array):
        raise VerificationError(f"{name}: {np.dtype(dtype).name} does not hold its numbers")
    return made
