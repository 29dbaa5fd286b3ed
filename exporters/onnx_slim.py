"""Rewrites traced graphs in operators that ONNX Runtime recognises and fuses; other patterns stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from gblm_compress.exporters.onnx_weights import constant, replace

TURNED = ".turned"  # suffix of a weight that is stored as [in_features, out_features]
_START, _END = np.iinfo(np.int64).min, np.iinfo(np.int64).max  # of an open slice


def slim_(program: ir.Model) -> None:
    rules: dict[str, Callable[[Tape, ir.Graph, ir.Node], ir.Value | None]] = {
        "Mul": _division,
        "Reshape": _transpose,
        "MatMul": _scaled_once,
        "Gemm": _product,
        "Add": _unfused,
    }
    for node in list(program.graph):
        tape, rule = Tape(), rules.get(node.op_type)
        made = rule(tape, program.graph, node) if rule is not None else None
        if made is not None:
            program.graph.insert_before(node, tape.nodes)
            replace(program.graph, node, made)
    RemoveUnusedNodesPass()(program)


def _division(tape: Tape, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """x · Reciprocal(√v) as x / √v, which ONNX Runtime recognises as an RMS norm."""
    for x, other in (node.inputs, reversed(node.inputs)):
        inverse = _made_by(other, "Reciprocal")
        if inverse is not None and _made_by(inverse.inputs[0], "Sqrt") is not None:
            return tape.op("Div", [x, inverse.inputs[0]])
    return None


def _product(tape: Tape, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """x · W + b of a constant W [in, out], or [out, in] with transB, as MatMul and Add, for the passes on MatMuls."""
    x, weight, *bias = node.inputs
    attributes = {name: node.attributes[name].value for name in node.attributes}
    if attributes.get("transA") or {attributes.get(name, 1.0) for name in ("alpha", "beta")} != {1.0}:
        return None
    if weight is None or weight.name not in graph.initializers or weight.const_value is None:
        return None
    if attributes.get("transB"):
        if {user.op_type for user, _ in weight.uses()} == {"Gemm"}:
            turned = f"{weight.name}{TURNED}"
            weight = constant(graph, turned, weight.const_value.numpy().T.copy())
        else:  # shared with an embedding, whose rows are read
            weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
    product = tape.op("MatMul", [x, weight], name=node.name)
    return tape.op("Add", [product, bias[0]]) if bias and bias[0] is not None else product


def _transpose(tape: Tape, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The transpose of matrices [batch, heads, tokens, width], made in three dimensions, as one Transpose."""
    turned = _made_by(node.inputs[0], "Transpose")
    flat = _made_by(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or flat is None or tuple(turned.attributes["perm"].as_ints()) != (0, 2, 1):
        return None
    x = flat.inputs[0]
    first, tokens, width = (_START, -2), (-2, -1), (-1, _END)
    if x is None or x.shape is None or len(x.shape) != 4:
        return None
    if _sizes(flat.inputs[1], x) != [-1, tokens, width] or _sizes(node.inputs[1], x) != [first, width, tokens]:
        return None
    return tape.op("Transpose", [x], {"perm": [0, 1, 3, 2]})


def _scaled_once(tape: Tape, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """(q·a) × (k·b) as (q·ab) × k: the cache has many keys, a step few queries."""
    left, right = (_made_by(value, "Mul") for value in node.inputs)
    if left is None or right is None:
        return None
    (q, a), (k, b) = left.inputs, right.inputs
    factors = [value.const_value.numpy() for value in (a, b) if value is not None and value.const_value is not None]
    if len(factors) != 2 or any(factor.ndim for factor in factors):
        return None
    both = np.prod([factor.astype(np.float64).item() for factor in factors]).astype(factors[0].dtype)
    scaled = tape.op("Mul", [q, constant(graph, f"scale.{both}", both)])
    scaled.shape, scaled.type = left.outputs[0].shape, left.outputs[0].type
    return tape.op("MatMul", [scaled, k])


def _unfused(tape: Tape, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The sum before a LayerNormalization as Sum. An Add is fused with it, which takes four times as long on a CPU."""
    before_norm = any(user.op_type == "LayerNormalization" for user, _ in node.outputs[0].uses())
    return tape.op("Sum", list(node.inputs)) if before_norm and node.outputs[0].dtype == ir.DataType.FLOAT else None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == operator else None


def _sizes(shape: ir.Value | None, x: ir.Value) -> list[Any]:
    """The parts of a shape: numbers, (start, end) of dimensions of `x`, None for anything else."""
    parts = _made_by(shape, "Concat")
    found: list[Any] = []
    for part in parts.inputs if parts is not None else ():
        cut = _made_by(part, "Slice")
        whole = _made_by(cut.inputs[0], "Shape") if cut is not None else None
        if cut is not None and whole is not None and whole.inputs[0] is x:
            found.append(tuple(_number(value) for value in cut.inputs[1:3]))
        else:
            found.append(_number(part))
    return found


def _number(value: ir.Value | None) -> int | None:
    tensor = value.const_value if value is not None else None
    return int(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None
