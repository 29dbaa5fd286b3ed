"""Pruned weights of an ONNX graph as bitmask and nonzeros: decoded by standard operators, or multiplied as they are.

`encode_initializers_` is for storage only: ONNX Runtime folds the decoder when it loads the graph, so that the session
holds, and runs, dense weights. The decoder of a weight with E elements in row-major order:

    bytes [E/8, 1] ─BitwiseAnd(1, 2, 4 … 128)─► [E/8, 8] ─Reshape─► [E] ─Cast─► bool ─Cast─► bits, int32
    bits ─CumSum─► · bits = for each weight, its place among the nonzeros counted from 1, and 0 for a zero
    Gather(values = [0, nonzeros…], places) ─Reshape─► the weight

No `Where` is used: ONNX Runtime does not fold it in float16. No `BitShift`: OpenVINO rounds it to nearest.

`onnx_kernels` is for speed.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

MASK, VALUES, STARTS = ".mask", ".nonzeros", ".starts"
ROWS = ".rows"  # of a weight that is stored as [out_features, in_features]


def encode_initializers_(program: ir.Model, names: list[str]) -> None:
    """Replace the named initializers by their packed form and a decoder, in place.

    A weight whose number of elements is no multiple of 8, or that would not become smaller, stays as it is.
    """
    graph = program.graph
    nodes: list[ir.Node] = []
    shared: dict[str, ir.Value] = {}

    def shared_constant(name: str, array: Any) -> ir.Value:
        if name not in shared:
            shared[name] = initializer(graph, f"bitmask_decoder.{name}", array)
        return shared[name]

    def node(operator: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        made = ir.node(operator, inputs, attributes=attributes or None)
        nodes.append(made)
        return made.outputs[0]

    for name in names:
        dense = graph.initializers[name]
        assert dense.const_value is not None
        weight = dense.const_value.numpy()
        packed = encode(weight)
        if packed is None:
            continue
        mask, values = packed
        powers = shared_constant("powers", 1 << np.arange(8, dtype=np.uint8))
        flat = shared_constant("flat", np.array([-1], dtype=np.int64))
        axis = shared_constant("axis", np.array(0, dtype=np.int64))
        shape = shared_constant("x".join(map(str, weight.shape)), np.array(weight.shape, dtype=np.int64))
        chosen = node("Reshape", [node("BitwiseAnd", [initializer(graph, name + MASK, mask), powers]), flat])
        bits = node("Cast", [node("Cast", [chosen], to=ir.DataType.BOOL)], to=ir.DataType.INT32)
        places = node("Mul", [node("CumSum", [bits, axis]), bits])
        decoded = node("Reshape", [node("Gather", [initializer(graph, name + VALUES, values), places], axis=0), shape])
        decoded.shape, decoded.dtype = dense.shape, dense.dtype
        del graph.initializers[name]
        dense.replace_all_uses_with(decoded)
        decoded.name = name
    graph.insert_before(graph[0], nodes)


def initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """An initializer of that name, added to the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    assert value.const_value is not None
    value.shape, value.dtype = ir.Shape(value.const_value.shape), value.const_value.dtype
    graph.initializers[name] = value
    return value


def replace(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Let `output` take the place of what a node of one output gives, under its name."""
    product = node.outputs[0]
    output.shape, output.type = product.shape, product.type
    is_output = product.is_graph_output()
    product.replace_all_uses_with(output, replace_graph_outputs=is_output)
    graph.remove(node, safe=True)
    output.name = product.name


def encode(weight: Any) -> tuple[Any, Any] | None:
    """(mask bytes [elements / 8, 1], values [1 + nonzeros]) of an array; None where that saves nothing.

    Bit b of byte i says whether element 8·i + b, in row-major order, is stored.
    """
    alive = weight.reshape(-1) != 0
    mask = np.packbits(alive, bitorder="little").reshape(-1, 1)
    values = np.concatenate([np.zeros(1, weight.dtype), weight.reshape(-1)[alive]])
    if weight.size % 8 or mask.nbytes + values.nbytes >= weight.nbytes:
        return None
    return mask, values
