"""Rewrites traced graphs in operators that ONNX Runtime recognises and fuses; other patterns stay."""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from gblm_compress.exporters.onnx_weights import constant, replace

TURNED = ".turned"  # suffix of a weight that is stored as [in_features, out_features]


def slim_(program: ir.Model) -> None:
    rules: dict[str, Callable[[Tape, ir.Graph, ir.Node], ir.Value | None]] = {
        "Mul": _division,
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


def _unfused(tape: Tape, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The sum before a LayerNormalization as Sum. An Add is fused with it, which takes four times as long on a CPU."""
    before_norm = any(user.op_type == "LayerNormalization" for user, _ in node.outputs[0].uses())
    return tape.op("Sum", list(node.inputs)) if before_norm and node.outputs[0].dtype == ir.DataType.FLOAT else None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == operator else None
