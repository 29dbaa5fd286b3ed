"""Products as Gemm: the same numbers as numpy's for inputs of any rank, and only where the weight is 2:4."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from gblm_compress.errors import UsageError
from gblm_compress.exporters import export
from gblm_compress.exporters.onnx_decoding import decode
from gblm_compress.exporters.onnx_gemm import use_gemm_
from gblm_compress.settings import ExportSettings


def weight(seed: int, columns: int) -> np.ndarray:
    """[8, columns], of whose every four neighbours in a column two are zero."""
    made = np.random.default_rng(seed).standard_normal((8, columns)).astype(np.float32)
    for column in range(columns):
        for first in (0, 4):
            made[first + (column + np.arange(2)) % 4, column] = 0
    return made


def graph(weights: dict[str, np.ndarray]) -> ir.Model:
    """y_NAME = x NAME for each; x is of any rank."""
    nodes = [onnx.helper.make_node("MatMul", ["x", name], [f"y_{name}"]) for name in weights]
    outputs = [onnx.helper.make_tensor_value_info(f"y_{name}", onnx.TensorProto.FLOAT, None) for name in weights]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    opset = [onnx.helper.make_opsetid("", 18)]
    made = onnx.helper.make_graph(nodes, "products", [x], outputs, initializers)
    return ir.from_proto(onnx.helper.make_model(made, opset_imports=opset, ir_version=10))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_products_of_inputs_of_any_rank(shape) -> None:
    weights = {"a": weight(0, 5), "b": weight(1, 7), "head": np.ones((8, 3), np.float32)}
    program = graph(weights)
    use_gemm_(program, ["a", "b"])
    assert [node.op_type for node in program.graph].count("Gemm") == 2
    assert program.graph.initializers.keys() >= {"a.rows", "b.rows", "head"}
    for name in ("a", "b"):
        assert np.array_equal(decode(program.graph.initializers, name, weights[name].shape), weights[name])
    model = ir.to_proto(program).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    for y, array in zip(session.run(None, {"x": x}), weights.values(), strict=True):
        assert y.shape == (*shape[:-1], array.shape[1])
        np.testing.assert_allclose(y, x @ array, rtol=1e-5, atol=1e-5)


def test_an_initializer_with_a_layer_that_is_not_2_to_4_is_refused() -> None:
    program = graph({"qkv": np.concatenate([weight(0, 4), np.ones((8, 4), np.float32)], axis=1)})
    with pytest.raises(UsageError, match=r"qkv: holds several layers, not all of them 2:4 \(row 4, columns 0 to 3: 4"):
        use_gemm_(program, ["qkv"])


def test_a_model_that_is_not_2_to_4_is_refused_before_the_graph_is_built(tiny, tmp_path, progress) -> None:
    with pytest.raises(UsageError, match=r"14 of 14 layers are not 2:4, which gemm needs:\n") as caught:
        export(tiny("llama"), tmp_path / "out", ExportSettings(format="onnx", gemm=True), progress=progress)
    assert "row 0, columns 0 to 3: 4 nonzeros" in str(caught.value) and not list(tmp_path.iterdir())
