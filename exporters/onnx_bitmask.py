"""Pruned weights of an ONNX graph as bitmask and nonzeros: decoded by standard operators, or multiplied as they are.

`encode_initializers_` is for storage only: ONNX Runtime folds the decoder when it loads the graph, so that the session
holds, and runs, dense weights. The decoder of a weight with E elements in row-major order:

    bytes [E/8, 1] ─BitShift(0…7)─► ─BitwiseAnd(1)─► ─Reshape─► bits [E] ─Cast─► int32
    bits ─CumSum─► · bits = for each weight, its place among the nonzeros counted from 1, and 0 for a zero
    Gather(values = [0, nonzeros…], places) ─Reshape─► the weight

No `Where` is used: ONNX Runtime does not fold it in float16.

`use_kernels_` is for speed: the MatMul becomes the operator gblm.BitmaskLinear (kernels/onnxruntime_op.c).
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.kernels.masks import WORD, row_starts
from gblm_compress.layouts.bitmask import check, pack, unpack

MASK, VALUES, STARTS = ".mask", ".nonzeros", ".starts"
DOMAIN, OPERATOR = "gblm", "BitmaskLinear"
DTYPES = ("float32", "float16")
MAX_WEIGHTS = 8  # that one BitmaskLinear multiplies by


def encode_initializers_(program: ir.Model, names: list[str]) -> None:
    """Replace the named initializers by their packed form and a decoder, in place.

    A weight whose number of elements is no multiple of 8, or that would not become smaller, stays as it is.
    """
    graph = program.graph
    nodes: list[ir.Node] = []
    shared: dict[str, ir.Value] = {}

    def constant(name: str, array: Any) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        graph.initializers[name] = value
        return value

    def shared_constant(name: str, array: Any) -> ir.Value:
        if name not in shared:
            shared[name] = constant(f"bitmask_decoder.{name}", array)
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
        shifts = shared_constant("shifts", np.arange(8, dtype=np.uint8))
        one = shared_constant("one", np.array([1], dtype=np.uint8))
        flat = shared_constant("flat", np.array([-1], dtype=np.int64))
        axis = shared_constant("axis", np.array(0, dtype=np.int64))
        shape = shared_constant("x".join(map(str, weight.shape)), np.array(weight.shape, dtype=np.int64))
        shifted = node("BitShift", [constant(name + MASK, mask), shifts], direction="RIGHT")
        bits = node("Cast", [node("Reshape", [node("BitwiseAnd", [shifted, one]), flat])], to=ir.DataType.INT32)
        places = node("Mul", [node("CumSum", [bits, axis]), bits])
        decoded = node("Reshape", [node("Gather", [constant(name + VALUES, values), places], axis=0), shape])
        decoded.shape, decoded.dtype = dense.shape, dense.dtype
        del graph.initializers[name]
        dense.replace_all_uses_with(decoded)
        decoded.name = name
    graph.insert_before(graph[0], nodes)


def use_kernels_(program: ir.Model, names: list[str]) -> None:
    """Multiply by the named initializers [in_features, out_features] with BitmaskLinear instead of MatMul, in place.

    MatMuls of the same input become one BitmaskLinear, at the place of the first.

    Raises:
        ModelError: a weight is not used by MatMuls alone, or its in_features is not a multiple of 64.
    """
    graph = program.graph
    packed: dict[str, list[ir.Value]] = {}
    same_input: dict[ir.Value, list[ir.Node]] = {}
    for name in names:
        dense = graph.initializers[name]
        assert dense.const_value is not None
        weight = torch.from_numpy(dense.const_value.numpy().T.copy())
        used_by = {f"{node.op_type} input {index}" for node, index in dense.uses()}
        if used_by != {"MatMul input 1"} or weight.shape[1] % WORD:
            raise ModelError(
                f"{name}: {OPERATOR} takes the place of a MatMul whose in_features is a multiple of {WORD}; this "
                f"weight has in_features={weight.shape[1]} and is used by {', '.join(sorted(used_by))}. Export with "
                "--sparse"
            )
        mask, values = pack(weight)
        packed[name] = []
        for suffix, tensor in ((MASK, mask), (VALUES, values), (STARTS, row_starts(mask))):
            value = ir.Value(name=name + suffix, const_value=ir.tensor(tensor.numpy(), name=name + suffix))
            value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
            graph.initializers[name + suffix] = value
            packed[name].append(value)
        for matmul, _ in dense.uses():
            same_input.setdefault(matmul.inputs[0], []).append(matmul)
    order = {node: number for number, node in enumerate(graph)}
    for x, matmuls in same_input.items():
        matmuls.sort(key=order.__getitem__)
        for first in range(0, len(matmuls), MAX_WEIGHTS):
            group = matmuls[first : first + MAX_WEIGHTS]
            weights = [value for matmul in group for value in packed[matmul.inputs[1].name]]
            node = ir.Node(DOMAIN, OPERATOR, [x, *weights], num_outputs=len(group), name=group[0].name)
            graph.insert_before(group[0], node)
            for matmul, output in zip(group, node.outputs, strict=True):
                product = matmul.outputs[0]
                output.shape, output.type = product.shape, product.type
                product.replace_all_uses_with(output)
                graph.remove(matmul, safe=True)
                output.name = product.name
    for name in names:
        del graph.initializers[name]
    program.opset_imports[DOMAIN] = 1


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


def decode(initializers: Any, name: str) -> Any:
    """The elements of a weight as its initializers store them, in the order they store them.

    Raises:
        VerificationError: an initializer is missing or does not fit the others.
    """

    def stored(suffix: str, *dtypes: str) -> Any:
        value = initializers.get(name + suffix)
        if value is None or value.const_value is None or value.const_value.numpy().dtype not in dtypes:
            raise VerificationError(f"{name + suffix}: the graph has no such initializer of {' or '.join(dtypes)}")
        return value.const_value.numpy()

    if name in initializers:
        return stored("", *DTYPES).reshape(-1)
    values = stored(VALUES, *DTYPES)
    if name + STARTS in initializers:
        mask, starts = torch.tensor(stored(MASK, "int64")), torch.tensor(stored(STARTS, "int64"))
        try:
            check(mask, torch.tensor(values), (len(mask), mask.shape[-1] * WORD))
        except ModelError as error:
            raise VerificationError(f"{name}.{error}") from error
        if not torch.equal(starts, row_starts(mask)):
            raise VerificationError(f"{name + STARTS}: does not say where the rows of the mask begin")
        return unpack(mask, torch.tensor(values), mask.shape[1] * WORD).numpy().reshape(-1)
    alive = np.unpackbits(stored(MASK, "uint8").reshape(-1), bitorder="little").astype(bool)
    if values.shape != (1 + alive.sum(),) or values[0] != 0:
        raise VerificationError(
            f"{name + VALUES}: shape {list(values.shape)}; the mask has {alive.sum()} bits, which takes one more"
        )
    dense = np.zeros(alive.shape, values.dtype)
    dense[alive] = values[1:]
    return dense
