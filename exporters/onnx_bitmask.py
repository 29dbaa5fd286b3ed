"""Pruned weights of an ONNX graph as bitmask and nonzeros: decoded by standard operators, or multiplied as they are.

`encode_initializers_` is for storage only: ONNX Runtime folds the decoder when it loads the graph, so that the session
holds, and runs, dense weights. The decoder of a weight with E elements in row-major order:

    bytes [E/8, 1] ─BitwiseAnd(1, 2, 4 … 128)─► [E/8, 8] ─Reshape─► [E] ─Cast─► bool ─Cast─► bits, int32
    bits ─CumSum─► · bits = for each weight, its place among the nonzeros counted from 1, and 0 for a zero
    Gather(values = [0, nonzeros…], places) ─Reshape─► the weight

No `Where` is used: ONNX Runtime does not fold it in float16. No `BitShift`: OpenVINO rounds it to nearest.

`use_kernels_` is for speed: MatMuls become the operators gblm.BitmaskLinear and, where the weight is dense,
gblm.DenseLinear (kernels/onnxruntime_op.c).
"""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.kernels.masks import WORD, row_starts
from gblm_compress.layouts.bitmask import check, pack, unpack

MASK, VALUES, STARTS = ".mask", ".nonzeros", ".starts"
ROWS = ".rows"  # of a weight that is stored as [out_features, in_features]
DOMAIN, VERSION = "gblm", 2
OPERATOR, DENSE_OPERATOR = "BitmaskLinear", "DenseLinear"
DTYPES = ("float32", "float16")
MAX_WEIGHTS = 8  # that one BitmaskLinear multiplies by


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


def use_kernels_(program: ir.Model, names: list[str], *, half: bool = False) -> None:
    """Multiply by the named initializers [in_features, out_features] with BitmaskLinear instead of MatMul, and by all
    others with DenseLinear, in place. Activations stay in float32.

    MatMuls of the same input become one BitmaskLinear, at the place of the first. An embedding that shares the weight
    of the head reads DenseLinear's, which has its orientation.

    Args:
        half: store all these weights, and the embedding, in float16; they must be its numbers.

    Raises:
        ModelError: a named weight is not used by MatMuls alone, or its in_features is not a multiple of 64.
    """
    stored = np.float16 if half else np.float32
    _use_bitmask(program, names, stored)
    _use_dense(program, stored)
    if half:
        _halve_embeddings(program)
    program.opset_imports[DOMAIN] = VERSION


def _use_bitmask(program: ir.Model, names: list[str], stored: Any) -> None:
    graph = program.graph
    packed: dict[str, list[ir.Value]] = {}
    same_input: dict[ir.Value, list[ir.Node]] = {}
    for name in names:
        dense = graph.initializers[name]
        assert dense.const_value is not None
        weight = torch.from_numpy(_as_stored(name, dense.const_value.numpy().T, stored))
        used_by = {f"{node.op_type} input {index}" for node, index in dense.uses()}
        if used_by != {"MatMul input 1"} or weight.shape[1] % WORD:
            raise ModelError(
                f"{name}: {OPERATOR} takes the place of a MatMul whose in_features is a multiple of {WORD}; this "
                f"weight has in_features={weight.shape[1]} and is used by {', '.join(sorted(used_by))}. Export with "
                "--sparse"
            )
        mask, values = pack(weight)
        parts = ((MASK, mask), (VALUES, values), (STARTS, row_starts(mask)))
        packed[name] = [initializer(graph, name + suffix, tensor.numpy()) for suffix, tensor in parts]
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
                replace(graph, matmul, output)
    for name in names:
        del graph.initializers[name]


def _use_dense(program: ir.Model, stored: Any) -> None:
    graph = program.graph
    turned: dict[ir.Value, ir.Value] = {}
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
            name = f"{before.name}{ROWS}"
            turned[before] = initializer(graph, name, _as_stored(name, array, stored))
            same = [user.outputs[0] for user, _ in before.uses() if _turns(user)] if before is weight else [before]
            for gather, _ in [use for value in same for use in value.uses() if use[0].op_type == "Gather"]:
                _gather(graph, gather, turned[before])
        node = ir.Node(DOMAIN, DENSE_OPERATOR, [matmul.inputs[0], turned[before]], name=matmul.name)
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


def _gather(graph: ir.Graph, gather: ir.Node, rows: ir.Value) -> None:
    """Let a Gather read `rows`; what it gives stays float32."""
    gather.replace_input_with(0, rows)
    if rows.dtype == ir.DataType.FLOAT:
        return
    output = gather.outputs[0]
    wide = ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT})
    wide.outputs[0].shape, wide.outputs[0].dtype = output.shape, ir.DataType.FLOAT
    graph.insert_after(gather, wide)
    output.replace_all_uses_with(wide.outputs[0])
    wide.replace_input_with(0, output)
    output.dtype = rows.dtype


def _halve_embeddings(program: ir.Model) -> None:
    """Store in float16 what rows are gathered from."""
    graph = program.graph
    for gather in [node for node in graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is None or table.name not in graph.initializers or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.shape or ()) == 2 and len(table.uses()) == 1 and table.const_value is not None:
            name = f"{table.name}{ROWS}"
            rows = initializer(graph, name, _as_stored(name, table.const_value.numpy(), np.float16))
            _gather(graph, gather, rows)
            del graph.initializers[table.name]


def _as_stored(name: str, array: Any, dtype: Any) -> Any:
    """A copy of the array in another dtype, which must lose nothing."""
    made = array.astype(dtype, order="C", copy=True)
    if not np.array_equal(made.astype(array.dtype), array):
        raise VerificationError(f"{name}: its numbers are not those of {np.dtype(dtype).name}")
    return made


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


def decode(initializers: Any, name: str, shape: tuple[int, ...]) -> Any:
    """The weight [in_features, out_features], or the other way round, as its initializers store it.

    Args:
        shape: of the initializer before it was packed.

    Raises:
        VerificationError: an initializer is missing or does not fit the others or the shape.
    """

    def stored(suffix: str, *dtypes: str) -> Any:
        value = initializers.get(name + suffix)
        if value is None or value.const_value is None or value.const_value.numpy().dtype not in dtypes:
            raise VerificationError(f"{name + suffix}: the graph has no such initializer of {' or '.join(dtypes)}")
        return value.const_value.numpy()

    def checked(array: Any) -> Any:
        if array.shape != shape:
            raise VerificationError(f"{name}.shape: {list(array.shape)}; the weight has {list(shape)}")
        return array

    if name in initializers:
        return checked(stored("", *DTYPES))
    if name + ROWS in initializers:
        return checked(stored(ROWS, *DTYPES).T)
    values = stored(VALUES, *DTYPES)
    if name + STARTS in initializers:
        mask, starts = torch.tensor(stored(MASK, "int64")), torch.tensor(stored(STARTS, "int64"))
        try:
            check(mask, torch.tensor(values), (len(mask), mask.shape[-1] * WORD))
        except ModelError as error:
            raise VerificationError(f"{name}.{error}") from error
        if not torch.equal(starts, row_starts(mask)):
            raise VerificationError(f"{name + STARTS}: does not say where the rows of the mask begin")
        return checked(unpack(mask, torch.tensor(values), mask.shape[1] * WORD).numpy().T)
    alive = np.unpackbits(stored(MASK, "uint8").reshape(-1), bitorder="little").astype(bool)
    if values.shape != (1 + alive.sum(),) or values[0] != 0:
        raise VerificationError(
            f"{name + VALUES}: shape {list(values.shape)}; the mask has {alive.sum()} bits, which takes one more"
        )
    dense = np.zeros(alive.shape, values.dtype)
    dense[alive] = values[1:]
    if dense.size != math.prod(shape):
        raise VerificationError(f"{name + MASK}: {dense.size} bits; the weight has {list(shape)} elements")
    return dense.reshape(shape)
