"""Each rule makes the same numbers of other nodes."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from gblm_compress.exporters.onnx_slim import slim_


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


def test_a_gemm_that_scales_stays() -> None:
    program = parsed("y = Gemm <alpha = 0.5> (x, w)", {"w": random(4, 6)}, {"x": ["tokens", 4]})
    slim_(program)
    assert operators(program) == ["Gemm"]


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
