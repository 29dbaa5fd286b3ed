"""Tables of rotary embeddings, made by the graph."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from gblm_compress.exporters.onnx_fused import calculate_rotations_
from gblm_compress.exporters.onnx_packing import initializer

POSITIONS, PAIRS = 8192, 32
TURNS = (1 / 10000 ** (np.arange(PAIRS) / PAIRS)).astype(np.float32)


ANGLES = np.outer(np.arange(POSITIONS, dtype=np.float32), TURNS)
"""In float32, as in transformers: beyond 4,096 radians each is rounded by up to 4.9e-4."""


def program(**named) -> ir.Model:
    """A graph that gives rows of its tables."""
    rows = ir.Value(name="rows", shape=ir.Shape([None]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([rows], [], nodes=[], opset_imports={"": 21}, name="tables")
    for name, table in named.items():
        node = ir.node("Gather", [initializer(graph, name, table), rows])
        node.outputs[0].name = f"{name}.rows"
        node.outputs[0].dtype = ir.tensor(table).dtype
        node.outputs[0].shape = ir.Shape([None, PAIRS])
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def session(made: ir.Model, folder, **options):
    ir.save(made, folder / "model.onnx")
    settings = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(settings, name, str(value))
    return onnxruntime.InferenceSession(folder / "model.onnx", settings)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 6e-4), (np.float16, 1.1e-3)])
def test_the_graph_makes_the_tables(dtype, tolerance, tmp_path) -> None:
    made = program(cos_cache=np.cos(ANGLES).astype(dtype), sin_cache=np.sin(ANGLES).astype(dtype))
    calculate_rotations_(made, [TURNS[:7], TURNS])
    assert max(one.const_value.size for one in made.graph.initializers.values()) == PAIRS
    found = session(made, tmp_path).run(None, {"rows": np.arange(POSITIONS)})
    exact = np.outer(np.arange(POSITIONS), TURNS.astype(np.float64))
    for one, expected in zip(found, (np.cos(exact), np.sin(exact)), strict=True):
        assert one.dtype == dtype and np.abs(one - expected).max() < tolerance


def test_a_session_holds_the_tables(tmp_path) -> None:
    """So that a step calculates none."""
    made = program(cos_cache=np.cos(ANGLES), sin_cache=np.sin(ANGLES), cos_cache_local=np.cos(ANGLES))
    calculate_rotations_(made, [TURNS])
    assert sum(node.op_type == "Range" for node in made.graph) == 1
    session(made, tmp_path, optimized_model_filepath=tmp_path / "folded.onnx")
    assert {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node} == {"Gather"}


@pytest.mark.parametrize("change", ["scaled", "other frequencies", "one number", "another name"])
def test_other_tables_stay(change) -> None:
    table, name = np.cos(ANGLES), "cos_cache"
    if change == "scaled":
        table = table * np.float32(1.2)
    elif change == "one number":
        table[4711, 0] += 0.01
    elif change == "another name":
        name = "table"
    made = program(**{name: table})
    calculate_rotations_(made, [TURNS * np.float32(1.001)] if change == "other frequencies" else [TURNS])
    assert list(made.graph.initializers) == [name] and len(made.graph) == 1
