"""Products of pruned 2:4 weights as Gemm, the operator that TensorRT's 2:4 kernels were made for.

    x [..., in] ─Reshape─► [tokens, in] ─Gemm(weight [out, in], transB)─► [tokens, out] ─Reshape─► y [..., out]

Everything is standard ONNX. Inputs of several products are reshaped once.
"""

import numpy as np
import onnx_ir as ir
import torch

from gblm_compress.errors import UsageError
from gblm_compress.exporters.onnx_bitmask import ROWS, initializer, replace
from gblm_compress.methods.patterns import Pattern

PATTERN = "2:4"


def use_gemm_(program: ir.Model, names: list[str]) -> None:
    """Multiply by the named initializers [in_features, out_features] with Gemm instead of MatMul, in place.

    Raises:
        UsageError: an initializer is not 2:4, because it also holds a layer that is not.
    """
    graph = program.graph
    turned: dict[ir.Value, ir.Value] = {}
    flat: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    wanted = {graph.initializers[name] for name in names}
    for matmul in [node for node in graph if node.op_type == "MatMul" and node.inputs[1] in wanted]:
        x, dense = matmul.inputs
        assert x is not None and dense is not None
        if dense not in turned:
            turned[dense] = _turned(graph, dense)
        rows, columns = (int(size) for size in turned[dense].shape or ())
        made: list[ir.Node] = []
        if x not in flat:
            to = _constant(graph, f"gemm.rows_of.{columns}", [-1, columns])
            made += [ir.node("Reshape", [x, to]), ir.node("Shape", [x], attributes={"end": -1})]
            flat[x] = made[0].outputs[0], made[1].outputs[0]
        matrix, leading = flat[x]
        product = ir.node("Gemm", [matrix, turned[dense]], attributes={"transB": 1}, name=matmul.name)
        shape = ir.node("Concat", [leading, _constant(graph, f"gemm.to.{rows}", [rows])], attributes={"axis": 0})
        output = ir.node("Reshape", [product.outputs[0], shape.outputs[0]], attributes={"allowzero": 1})
        graph.insert_before(matmul, [*made, product, shape, output])
        replace(graph, matmul, output.outputs[0])
    for dense in turned:
        if not dense.uses():
            del graph.initializers[dense.name]


def _turned(graph: ir.Graph, dense: ir.Value) -> ir.Value:
    """An initializer with the transpose [out_features, in_features] of another."""
    assert dense.const_value is not None
    weight = np.array(dense.const_value.numpy().T, order="C")
    if violation := Pattern(PATTERN).first_violation(torch.from_numpy(weight)):
        raise UsageError(
            f"{dense.name}: holds several layers, not all of them {PATTERN} ({violation}); export with --graph plain"
        )
    return initializer(graph, f"{dense.name}{ROWS}", weight)


def _constant(graph: ir.Graph, name: str, sizes: list[int]) -> ir.Value:
    return graph.initializers.get(name) or initializer(graph, name, np.array(sizes, np.int64))
