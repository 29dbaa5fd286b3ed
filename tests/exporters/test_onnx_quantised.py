"""Weights as levels in ONNX graphs: torch with the numbers of the file gives the logits of the graph."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from gblm_compress.errors import MissingDependencyError, UsageError
from gblm_compress.exporters import export
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, ExportSettings, PruneSettings
from tests.hostile_graphs import restored


def _operator_missing() -> bool:
    try:
        return not cpu.onnxruntime_library()
    except MissingDependencyError:
        return True


pytestmark = pytest.mark.skipif(_operator_missing(), reason="compiled without ONNX Runtime's C header")
WAYS = {
    "int8": {"quantise": "int8"},
    "int8 by 32": {"quantise": "int8", "group": 32},
    "int4": {"quantise": "int4"},
    "plain": {"quantise": "int4", "graph": "plain"},
}


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory) -> ModelSource:
    """A tiny Llama with a tied head, half of its weights zero."""
    folder = tmp_path_factory.mktemp("quantised") / "pruned"
    settings = PruneSettings(method="magnitude", fit="none")
    prune(tiny("llama"), folder, settings, CalibrationSettings(), progress=Progress(quiet=True))
    return ModelSource("pruned", folder)


def exported(source: ModelSource, folder, progress, **options):
    settings = ExportSettings(format="onnx", kernels=True, **options)
    return export(source, folder, settings, progress=progress), ModelSource("out", folder)


def weights_in(folder: ModelSource) -> list[np.ndarray]:
    """The weight of every input of QuantisedLinear, value by value."""
    graph = onnx.load(folder.folder / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "QuantisedLinear"]
    others = [node for node in graph.node if node.op_type in ("MatMul", "BitmaskLinear", "DenseLinear")]
    assert nodes and not any(name in stored for node in others for name in node.input)
    return [
        restored(*(stored[name] for name in node.input[first : first + 4]))
        for node in nodes
        for first in range(1, len(node.input), 4)
    ]


def with_weights_of(source: ModelSource, folder: ModelSource):
    """The dense model with the weights that are in the file, put where they are nearest."""
    model = load_model(source, "float32")
    given = weights_in(folder)
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            dense = module.weight.numpy()
            rows, columns = dense.shape
            parts = [w[at : at + rows] for w in given if w.shape[1] == columns for at in range(len(w) - rows + 1)]
            best = min(parts, key=lambda part: float(np.abs(part - dense).sum()))
            assert ((best == 0) >= (dense == 0)).all(), name
            module.weight.copy_(torch.from_numpy(best))
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_computes_with_the_numbers_of_the_file(pruned, tmp_path, progress, way: str) -> None:
    result, folder = exported(pruned, tmp_path / "out", progress, **WAYS[way])
    assert result.checks["weights"] == WAYS[way]["quantise"] and result.checks["logits_relative_difference"] < 1e-3
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = TorchRuntime(with_weights_of(pruned, folder)).predict({"input_ids": ids})
    got = OnnxRuntime(folder, "cpu", 2).predict({"input_ids": ids})
    assert float((got - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    dense = TorchRuntime(load_model(pruned, "float32")).predict({"input_ids": ids})
    assert float((got - dense).abs().max()) > 1e-3 * float(dense.abs().max())  # it did round


def test_int8_rounds_each_row_by_its_largest_weight(pruned, tmp_path, progress) -> None:
    _, folder = exported(pruned, tmp_path / "out", progress, quantise="int8")
    weight = load_model(pruned, "float32").model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = np.empty_like(weight)
    for row in range(len(weight)):
        scale = np.float32(np.float16(np.abs(weight[row]).max() / 127))
        for column in range(weight.shape[1]):
            expected[row, column] = np.clip(np.rint(weight[row, column] / scale), -127, 127) * scale
    assert any(w.shape == weight.shape and np.allclose(w, expected, atol=1e-7) for w in weights_in(folder))


def test_layers_of_which_rounding_moved_much_are_named(pruned, tmp_path, progress, monkeypatch) -> None:
    plain, _ = exported(pruned, tmp_path / "plain", progress, quantise="int8")
    assert 0 < plain.checks["largest_rounding_error"] < 0.03 and "layers_rounded_much" not in plain.checks
    kind, limit = LAYOUTS["bitmask-int8"].kind, plain.checks["largest_rounding_error"] * 0.999
    monkeypatch.setattr(kind, "largest_error", limit)
    named, _ = exported(pruned, tmp_path / "named", progress, quantise="int8")
    names = named.checks["layers_rounded_much"]
    assert 0 < len(names) < 14 and all(name.endswith("down_proj") for name in names)


def test_one_matrix_of_levels_is_head_and_embedding(pruned, tmp_path, progress) -> None:
    _, folder = exported(pruned, tmp_path / "out", progress, quantise="int4")
    graph = onnx.load(folder.folder / "model.onnx", load_external_data=False).graph
    tables = [tensor for tensor in graph.initializer if list(tensor.dims) == [257, 64]]
    assert [tensor.data_type for tensor in tables] == [onnx.TensorProto.INT8]
    assert {node.op_type for node in graph.node if tables[0].name in node.input} == {"Gather", "QuantisedLinear"}


def test_weights_pruned_onto_grids_are_stored_as_they_are(tiny, tmp_path, prose, progress) -> None:
    settings = PruneSettings(method="magnitude", fit="none", quantise="int4", group=32)
    prune(tiny("llama"), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source = ModelSource("pruned", tmp_path / "pruned")
    with pytest.raises(UsageError, match="group 64: the model was pruned onto grids of 32; leave --group out"):
        exported(source, tmp_path / "out", progress, quantise="int4", group=64)
    _, folder = exported(source, tmp_path / "out", progress, quantise="int4")
    found = weights_in(folder)
    for name, weight in load_model(source, "float32").named_parameters():
        if "proj" in name:
            dense = weight.detach().numpy()
            parts = [w[at : at + len(dense)] for w in found if w.shape[1] == dense.shape[1] for at in range(len(w))]
            assert any(p.shape == dense.shape and np.allclose(p, dense, rtol=1e-6, atol=0) for p in parts), name


@pytest.mark.parametrize(
    ("kind", "format"), [("int4", "bitmask-int4"), ("int4", "bitmask-int8"), ("int8", "bitmask-int8")]
)
def test_weights_pruned_onto_grids_are_packed_as_they_are(tiny, tmp_path, progress, kind: str, format: str) -> None:
    settings = PruneSettings(method="magnitude", fit="none", quantise=kind, group=32)
    prune(tiny("llama"), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source, packed = (ModelSource(name, tmp_path / name) for name in ("pruned", "packed"))
    with pytest.raises(UsageError, match="group 64: the model was pruned onto grids of 32; leave --group out"):
        export(source, packed.folder, ExportSettings(format=format, group=64), force=False, progress=progress)
    export(source, packed.folder, ExportSettings(format=format), force=False, progress=progress)
    loaded = load_model(packed)
    for name, weight in load_model(source, "float32").named_parameters():
        if "proj" in name:
            assert torch.equal(loaded.get_submodule(name.removesuffix(".weight")).dense_weight(), weight), name


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_products_that_are_traced_as_gemms_run_on_the_operator(tiny, tmp_path, progress, kind: str) -> None:
    settings = PruneSettings(method="magnitude", fit="none")
    prune(tiny(kind), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source = ModelSource("pruned", tmp_path / "pruned")
    result, folder = exported(source, tmp_path / "out", progress, quantise="int8")
    assert result.checks["graph"] == "plain" and result.checks["layers_checked"] == {"gpt2": 8, "opt": 12}[kind]
    assert len(weights_in(folder)) == {"gpt2": 9, "opt": 13}[kind]
    assert "Gemm" not in folder.operators


def test_a_dense_model_has_no_masks_in_8_bits(tiny, tmp_path, progress) -> None:
    _, folder = exported(tiny("llama"), tmp_path / "out", progress, quantise="int8")
    graph = onnx.load(folder.folder / "model.onnx", load_external_data=False).graph
    assert {tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT64 and len(t.dims) == 2} == {
        (0, 0)
    }
    weights_in(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int8", "sparse": True}, "leave one out"),
        ({"quantise": "int8", "kernels": True, "dtype": "float16"}, "give no other dtype"),
        ({"kernels": True, "group": 64}, "group would do nothing without quantise"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportSettings(format="onnx", **options)


PACK = """
import hashlib, onnx, onnx_ir as ir, torch
from gblm_compress.exporters import onnx_packing, onnx_weights
from gblm_compress.layouts import LAYOUTS

model, info, helper = torch.nn.Module(), onnx.helper.make_tensor_value_info, onnx.helper
names, sizes = [f"layer{number}" for number in range(9)], [onnx.TensorProto.FLOAT, [1, 64]]
weights = {name: torch.eye(64) * (1 + number) for number, name in enumerate(names)}
packed = {name: LAYOUTS["bitmask-int8"].layer.from_dense(weight, None) for name, weight in weights.items()}
nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in names]
stored = [onnx.numpy_helper.from_array(weight.T.numpy(), name) for name, weight in weights.items()]
graph = helper.make_graph(nodes, "g", [info("x", *sizes)], [info(f"y{name}", *sizes) for name in names], stored)
program = ir.from_proto(helper.make_model(graph))
merged = onnx_weights.stacked(packed, {name: onnx_weights.Place(name, (64, 64), 0, 64) for name in names})
onnx_packing.use_kernels_(program, list(merged), packed=merged)
print(hashlib.sha256(ir.to_proto(program).SerializeToString()).hexdigest())
"""


def test_the_bytes_of_a_graph_do_not_depend_on_the_hashes_of_a_process() -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PACK], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate(timeout=120)[0] for process in started)
    assert first and first == second
