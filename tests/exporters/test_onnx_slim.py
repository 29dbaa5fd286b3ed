"""Each rule makes the same numbers of fewer nodes, and leaves what only looks like it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from gblm_compress.exporters.onnx_slim import slim_

START, END = np.iinfo(np.int64).min, np.iinfo(np.int64).max
MATRICES = ["batch", 2, "tokens", 4]


def parsed(nodes: str, constants: dict[str, object], shapes: dict[str, list]) -> ir.Model:
    """A graph from nodes in ONNX's text. The last node gives "y"; `shapes` are those of the inputs."""
    inputs = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    output = ", ".join("?" * len(next(iter(shapes.values()))))
    opset = '<ir_version: 10, opset_import: ["" : 18]>'
    made = parse_model(f"{opset} graph ({inputs}) => (float[{output}] y) {{ {nodes} }}")
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
    return ir.from_proto(made)


def operators(program: ir.Model) -> list[str]:
    return [node.op_type for node in program.graph]


def run(program: ir.Model, **given: np.ndarray) -> np.ndarray:
    content = ir.to_proto(program).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["y"], given)[0]


def optimised(graph: Path | bytes, folder: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a graph as it loads it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return operators(ir.load(folder / "optimized.onnx"))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("order", ["x, inverse", "inverse, x"])
def test_a_norm_is_divided(order, tmp_path) -> None:
    nodes = f"""squares = Pow (x, two)
        mean = ReduceMean <keepdims = 1> (squares, last)
        power = Add (mean, epsilon)
        root = Sqrt (power)
        inverse = Reciprocal (root)
        normed = Mul ({order})
        y = Mul (weight, normed)"""
    weight = random(8)
    constants = {"two": np.float32(2), "last": np.array([-1]), "epsilon": np.float32(1e-5), "weight": weight}
    program = parsed(nodes, constants, {"x": ["batch", "tokens", 8]})
    slim_(program)
    assert operators(program) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    x = random(2, 3, 8)
    expected = weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(program, x=x), expected, rtol=1e-5, atol=1e-6)
    assert optimised(ir.to_proto(program).SerializeToString(), tmp_path) == ["SimplifiedLayerNormalization"]


def transposed(last: str, perm: str = "0, 2, 1") -> ir.Model:
    """The matrices of x transposed as torch's exporter writes it; `last` are the parts of the result's shape."""
    nodes = f"""shape = Shape (x)
        first = Slice (shape, start, minus2)
        tokens = Slice (shape, minus2, minus1)
        width = Slice (shape, minus1, end)
        flat_shape = Concat <axis = 0> (minus1, tokens, width)
        flat = Reshape (x, flat_shape)
        turned = Transpose <perm = [{perm}]> (flat)
        last_shape = Concat <axis = 0> ({last})
        y = Reshape (turned, last_shape)"""
    numbers = {"start": [START], "minus2": [-2], "minus1": [-1], "end": [END]}
    return parsed(nodes, numbers, {"x": MATRICES})


def test_a_transpose_is_one_node() -> None:
    program = transposed("first, width, tokens")
    slim_(program)
    assert operators(program) == ["Transpose"]
    x = random(3, 2, 5, 4)
    np.testing.assert_array_equal(run(program, x=x), x.swapaxes(2, 3))


@pytest.mark.parametrize(("turned", "bias", "shared"), [(0, 1, 0), (1, 1, 0), (1, 0, 1), (0, 0, 0)])
def test_a_gemm_of_a_constant_is_a_matmul(turned: int, bias: int, shared: int) -> None:
    weight, b, x = random(4, 6), random(6), random(3, 4)
    gemm = f"Gemm <transB = {turned}> (x, w{', b' * bias})"
    constants = {"w": weight.T.copy() if turned else weight, **({"b": b} if bias else {})}
    if shared:  # with an embedding
        nodes = f"z = {gemm} r = Gather (w, row) r0 = ReduceSum <keepdims = 0> (r) y = Add (z, r0)"
        constants["row"] = np.array([1])
    else:
        nodes = f"y = {gemm}"
    program = parsed(nodes, constants, {"x": ["tokens", 4]})
    slim_(program)
    assert "Gemm" not in operators(program) and "MatMul" in operators(program)
    expected = x @ weight + bias * b + shared * weight[:, 1].sum()
    np.testing.assert_allclose(run(program, x=x), expected, rtol=1e-5, atol=1e-5)


SCALED, HEADS = "qa = Mul (q, a) kb = Mul (k, b) y = MatMul (qa, kb)", {"q": MATRICES, "k": ["batch", 2, 4, "all"]}


def test_queries_are_scaled_and_keys_are_not() -> None:
    program = parsed(SCALED, {"a": np.float32(0.5), "b": np.float32(0.25)}, HEADS)
    slim_(program)
    assert operators(program) == ["Mul", "MatMul"] and program.graph[1].inputs[1].name == "k"
    q, k = random(1, 2, 3, 4), random(1, 2, 4, 6)
    np.testing.assert_allclose(run(program, q=q, k=k), 0.125 * (q @ k), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "program",
    [
        transposed("first, tokens, width"),
        transposed("first, width, tokens", "0, 1, 2"),
        parsed("y = Gemm <alpha = 0.5> (x, w)", {"w": random(4, 6)}, {"x": ["tokens", 4]}),
        parsed(SCALED, {"a": random(4), "b": np.float32(0.25)}, HEADS),  # each column by another number
    ],
)
def test_what_only_looks_like_it_stays(program: ir.Model) -> None:
    before = ir.to_proto(program).SerializeToString()
    slim_(program)
    assert ir.to_proto(program).SerializeToString() == before


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_a_sum_and_a_norm_stay_apart_in_float32(dtype: ir.DataType, tmp_path) -> None:
    nodes = "summed = Add (x, z) y = LayerNormalization (summed, weight, bias)"
    constants = {"weight": random(8), "bias": random(8)}
    program = parsed(nodes, constants, {"x": ["batch", "tokens", 8], "z": ["batch", "tokens", 8]})
    program.graph[0].outputs[0].dtype = dtype
    slim_(program)
    if dtype != ir.DataType.FLOAT:
        assert operators(program) == ["Add", "LayerNormalization"]
        return
    assert optimised(ir.to_proto(program).SerializeToString(), tmp_path) == ["Sum", "LayerNormalization"]
    x, z = random(2, 3, 8), random(1, 2, 3, 8)[0]
    summed = (x + z).astype(np.float64)
    normed = (summed - summed.mean(-1, keepdims=True)) / np.sqrt(summed.var(-1, keepdims=True) + 1e-5)
    expected = normed * constants["weight"] + constants["bias"]
    np.testing.assert_allclose(run(program, x=x, z=z), expected, rtol=1e-5, atol=1e-5)
