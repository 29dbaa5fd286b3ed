"""Each rule makes the same numbers of fewer nodes, and leaves what only looks like it."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gblm_compress.exporters.onnx_slim import slim_

START, END = np.iinfo(np.int64).min, np.iinfo(np.int64).max
MATRICES = ["batch", 2, "tokens", 4]


def graph(nodes: list, constants: dict[str, np.ndarray], shapes: dict[str, list]) -> ir.Model:
    """Of nodes of which the last gives "y"; `shapes` are those of its inputs."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(next(iter(shapes.values()))))
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "graph", inputs, [output], initializers)
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def operators(program: ir.Model) -> list[str]:
    return [node.op_type for node in program.graph]


def run(program: ir.Model, **given: np.ndarray) -> np.ndarray:
    content = ir.to_proto(program).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["y"], given)[0]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("order", [("x", "inverse"), ("inverse", "x")])
def test_a_norm_is_divided(order, tmp_path) -> None:
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "last"], ["mean"], keepdims=1),
        helper.make_node("Add", ["mean", "epsilon"], ["power"]),
        helper.make_node("Sqrt", ["power"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["inverse"]),
        helper.make_node("Mul", order, ["normed"]),
        helper.make_node("Mul", ["weight", "normed"], ["y"]),
    ]
    weight = random(8)
    constants = {"two": np.float32(2), "last": np.array([-1]), "epsilon": np.float32(1e-5), "weight": weight}
    program = graph(nodes, constants, {"x": ["batch", "tokens", 8]})
    slim_(program)
    assert operators(program) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    x = random(2, 3, 8)
    expected = np.empty_like(x)
    for row, column in np.ndindex(2, 3):
        expected[row, column] = weight * x[row, column] / np.sqrt(np.mean(x[row, column] ** 2) + 1e-5)
    np.testing.assert_allclose(run(program, x=x), expected, rtol=1e-5, atol=1e-6)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(program).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert operators(ir.load(tmp_path / "optimized.onnx")) == ["SimplifiedLayerNormalization"]


def transposed(last: list[str], perm: tuple[int, ...] = (0, 2, 1)) -> ir.Model:
    """The matrices of x transposed as torch's exporter writes it; `last` are the parts of the result's shape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "start", "minus2"], ["first"]),
        helper.make_node("Slice", ["shape", "minus2", "minus1"], ["tokens"]),
        helper.make_node("Slice", ["shape", "minus1", "end"], ["width"]),
        helper.make_node("Concat", ["minus1", "tokens", "width"], ["flat_shape"], axis=0),
        helper.make_node("Reshape", ["x", "flat_shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=perm),
        helper.make_node("Concat", last, ["last_shape"], axis=0),
        helper.make_node("Reshape", ["turned", "last_shape"], ["y"]),
    ]
    numbers = {"start": START, "minus2": -2, "minus1": -1, "end": END}
    return graph(nodes, {name: np.array([number]) for name, number in numbers.items()}, {"x": MATRICES})


def test_a_transpose_is_one_node() -> None:
    program = transposed(["first", "width", "tokens"])
    slim_(program)
    assert operators(program) == ["Transpose"]
    x = random(3, 2, 5, 4)
    np.testing.assert_array_equal(run(program, x=x), x.swapaxes(2, 3))


@pytest.mark.parametrize(("turned", "bias", "shared"), [(0, 1, 0), (1, 1, 0), (1, 0, 1), (0, 0, 0)])
def test_a_gemm_of_a_constant_is_a_matmul(turned: int, bias: int, shared: int) -> None:
    weight, b, x = random(4, 6), random(6), random(3, 4)
    names = ["x", "w", *(["b"] if bias else [])]
    nodes = [helper.make_node("Gemm", names, ["y"], transB=turned)]
    constants = {"w": weight.T.copy() if turned else weight, **({"b": b} if bias else {})}
    if shared:  # with an embedding
        nodes[0].output[0] = "z"
        nodes += [helper.make_node("Gather", ["w", "row"], ["r"]), helper.make_node("Add", ["z", "r0"], ["y"])]
        nodes.insert(2, helper.make_node("ReduceSum", ["r"], ["r0"], keepdims=0))
        constants["row"] = np.array([1])
    program = graph(nodes, constants, {"x": ["tokens", 4]})
    slim_(program)
    assert "Gemm" not in operators(program) and "MatMul" in operators(program)
    expected = x @ weight + bias * b + shared * weight[:, 1].sum()
    np.testing.assert_allclose(run(program, x=x), expected, rtol=1e-5, atol=1e-5)


def test_a_gemm_that_scales_stays() -> None:
    program = graph([helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5)], {"w": random(4, 6)}, {"x": ["tokens", 4]})
    slim_(program)
    assert operators(program) == ["Gemm"]


@pytest.mark.parametrize(
    ("last", "perm"), [(["first", "tokens", "width"], (0, 2, 1)), (["first", "width", "tokens"], (0, 1, 2))]
)
def test_another_reshape_stays(last, perm) -> None:
    program, x = transposed(last, perm), random(3, 2, 5, 4)
    before, expected = operators(program), run(program, x=x)
    slim_(program)
    assert operators(program) == before
    np.testing.assert_array_equal(run(program, x=x), expected)


@pytest.mark.parametrize("of_each_column", [False, True])
def test_queries_are_scaled_and_keys_are_not(of_each_column: bool) -> None:
    nodes = [
        helper.make_node("Mul", ["q", "a"], ["qa"]),
        helper.make_node("Mul", ["k", "b"], ["kb"]),
        helper.make_node("MatMul", ["qa", "kb"], ["y"]),
    ]
    constants = {"a": random(4) if of_each_column else np.float32(0.5), "b": np.float32(0.25)}
    program = graph(nodes, constants, {"q": MATRICES, "k": ["batch", 2, 4, "all"]})
    slim_(program)
    if of_each_column:
        assert operators(program) == ["Mul", "Mul", "MatMul"]
    else:
        assert operators(program) == ["Mul", "MatMul"] and program.graph[1].inputs[1].name == "k"
        q, k = random(1, 2, 3, 4), random(1, 2, 4, 6)
        np.testing.assert_allclose(run(program, q=q, k=k), 0.125 * (q @ k), rtol=1e-6, atol=1e-6)
