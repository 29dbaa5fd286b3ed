"""Weights as levels: the numbers of the file are those that torch rounds to, for both kinds of operators."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.exporters import check, onnx_rounding, onnx_verification
from gblm_compress.exporters.onnx_rounding import Blocks, Channels, use_nbits_
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import share_moved
from gblm_compress.methods.quantisation import make_grid, rounded
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import ExportSettings
from tests.conftest import export
from tests.exporters.test_onnx import needs_operator
from tests.exporters.test_onnx_slim import parsed, run
from tests.hostile_graphs import restored
from tests.scripts import python

pytestmark = needs_operator
WIDTHS = {"int8": 8, "int4": 4}
ON_KERNELS = {"format": "onnx", "kernels": True}
UP = "model.layers.0.mlp.up_proj"


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


def round_(model, source, settings, *, is_dense):
    layers = {name: layer for block in prunable_layers(model) for name, layer in block.items()}
    pack = onnx_rounding.packer(source, settings, is_dense=is_dense)
    return onnx_rounding.round_(model, layers.items(), pack, {n: layer.weight.numel() for n, layer in layers.items()})


@pytest.mark.parametrize(
    ("is_dense", "quantise", "group"),
    [(False, "int8", None), (False, "int8", 32), (False, "int4", None), (True, "int8", None)],
)
def test_the_graph_has_the_numbers_of_the_file(tiny, pruned, tmp_path, monkeypatch, is_dense, quantise, group) -> None:
    monkeypatch.setitem(onnx_verification.TOLERANCE, "levels", 1e-3)
    source = tiny("llama") if is_dense else pruned()
    result, folder = export(source, tmp_path / "out", **ON_KERNELS, quantise=quantise, group=group)
    assert result.checks["weights"] == quantise
    model = load_model(source, "float32")
    round_(model, source, ExportSettings(**ON_KERNELS, quantise=quantise, group=group), is_dense=is_dense)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    expected = {row.tobytes() for layer in layers for row in layer.weight.detach().numpy()}
    assert {row.tobytes() for weight in weights_in(folder) for row in weight.astype(np.float32)} == expected
    graph = onnx.load(folder.folder / "model.onnx", load_external_data=False).graph
    (table,) = [tensor for tensor in graph.initializer if list(tensor.dims) == [257, 64]]  # head and embedding
    assert table.data_type == onnx.TensorProto.INT8
    assert {node.op_type for node in graph.node if table.name in node.input} == {"Gather", "QuantisedLinear"}
    masks = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT64 and len(t.dims) == 2]
    assert ({tuple(mask.dims) for mask in masks} == {(0, 0)}) == is_dense


def test_layers_of_which_rounding_moved_much_are_named(pruned, monkeypatch) -> None:
    settings = ExportSettings(**ON_KERNELS, quantise="int8")

    def checks():
        return round_(load_model(pruned(), "float32"), pruned(), settings, is_dense=False).checks

    largest = checks()["largest_rounding_error"]
    assert 0 < largest < 0.03 and "layers_rounded_much" not in checks()
    monkeypatch.setattr(LAYOUTS["bitmask-int8"].kind, "largest_error", largest * 0.999)
    names = checks()["layers_rounded_much"]
    assert 0 < len(names) < 14 and all(name.endswith("down_proj") for name in names)


@pytest.mark.parametrize("factor", [1e-8, 1e30])
@pytest.mark.parametrize("quantise", WIDTHS)
@pytest.mark.parametrize("name", [UP, "lm_head"])
def test_weights_whose_scales_float16_does_not_hold_are_refused(tiny, factor: float, quantise: str, name: str) -> None:
    """By this package's operators; ONNX Runtime's have scales in float32."""
    source = tiny("llama")
    model = load_model(source, "float32")
    model.get_submodule(name).weight.data *= factor
    layer = {"lm_head": "head"}.get(name, name)
    with pytest.raises(ModelError, match=f"^{layer}: its weights need scales from .*; export without --kernels or"):
        round_(model, source, ExportSettings(**ON_KERNELS, quantise=quantise), is_dense=True)
    weight = load_model(source, "float32").get_submodule(name).weight.detach() * factor
    round_(model, source, ExportSettings(format="onnx", quantise=quantise), is_dense=True)
    assert share_moved(model.get_submodule(name).weight.detach(), weight) < 0.2


@pytest.mark.parametrize("kernels", [True, False])
def test_the_layer_of_which_rounding_makes_most_zero_is_named(tiny, kernels: bool) -> None:
    """Beside one large weight a row's others are a thousandth of a step."""
    model = load_model(tiny("llama"), "float32")
    weight = model.get_submodule(UP).weight.data
    weight[:, 1:] *= 1e-5
    before = count_nonzeros(weight)
    settings = ExportSettings(format="onnx", kernels=kernels, quantise="int8", group=64)
    said = round_(model, tiny("llama"), settings, is_dense=True).checks
    lost = before - count_nonzeros(weight)
    assert lost > 0.9 * before and lost <= said["rounded_to_zero"] < 1.5 * lost
    assert said["most_rounded_to_zero"] == f"{UP} ({lost / before:.1%} of its nonzeros)"
    layers = [weight_matrix(layer) for block in prunable_layers(model) for layer in block.values()]
    assert said["nonzero_fraction"] == sum(map(count_nonzeros, layers)) / sum(layer.numel() for layer in layers)


@pytest.mark.parametrize("kind", WIDTHS)
def test_weights_pruned_onto_grids_are_stored_as_they_are(pruned, tmp_path, kind: str) -> None:
    source = pruned(quantise=kind, group=32)
    with pytest.raises(UsageError, match="group 64: the model was fitted to grids of 32; leave --group out"):
        check(source, ExportSettings(**ON_KERNELS, quantise=kind, group=64))
    with pytest.raises(UsageError, match="pruned onto grids of 32, which ONNX Runtime lacks; add --kernels"):
        check(source, ExportSettings(format="onnx", quantise=kind))
    packed = load_model(export(source, tmp_path / "packed", format=f"bitmask-{kind}")[1])
    exact, again = load_model(source, "float32"), load_model(source, "float32")
    round_(again, source, ExportSettings(**ON_KERNELS, quantise=kind), is_dense=False)
    for name, layer in (pair for block in prunable_layers(exact) for pair in block.items()):
        assert torch.equal(packed.get_submodule(name).weight, layer.weight), name
        assert torch.equal(again.get_submodule(name).weight, layer.weight), name


PACK = """
import hashlib, onnx_ir as ir, torch
from gblm_compress.exporters import onnx_packing, onnx_weights
from gblm_compress.layouts.packed_linear import PackedLinear
from tests.exporters.test_onnx_slim import parsed

weights = {f"layer{n}": torch.eye(64) * (1 + n) for n in range(9)}
packed = {name: PackedLinear.from_dense("bitmask-int8", weight) for name, weight in weights.items()}
products = " ".join(f"y{n} = MatMul (x, layer{n})" for n in range(9))
program = parsed(f"{products} y = Sum ({', '.join(f'y{n}' for n in range(9))})", weights, {"x": [1, 64]})
merged = onnx_weights.stacked(packed, {name: onnx_weights.Place(name, (64, 64), 0, 64) for name in weights})
onnx_packing.use_kernels_(program, list(merged), packed=merged)
print(hashlib.sha256(ir.to_proto(program).SerializeToString()).hexdigest())
"""


def test_the_bytes_of_a_graph_do_not_depend_on_the_hashes_of_a_process() -> None:
    first, second = (python("-c", PACK, PYTHONHASHSEED=seed).stdout for seed in "12")
    assert first and first == second


def test_rounding_leaves_the_log_of_the_callers_program_as_it_is() -> None:
    code = (
        "import logging, torch\nfrom gblm_compress.exporters.onnx_rounding import Blocks\n"
        "Blocks.from_dense(torch.ones(4, 32), 8, 32)\nprint(logging.root.handlers, logging.root.level)"
    )
    assert python("-c", code).stdout == "[] 30\n"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [64, 80])
def test_blocks_hold_the_nearest_points_and_zeros_as_zeros(bits, columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0
    packed = Blocks.from_dense(weight, bits, group=32)
    dense = packed.dense_weight()
    program = parsed("y = MatMul (x, w)", {"w": weight.T.numpy()}, {"x": [columns, columns]})
    use_nbits_(program, {"w": packed}, [])
    np.testing.assert_allclose(run(program, x=np.eye(columns, dtype=np.float32)), dense.numpy().T, rtol=1e-5, atol=1e-6)
    assert not dense[weight == 0].any() and not torch.signbit(dense[dense == 0]).any()
    step = torch.from_numpy(np.abs(packed.scales)).repeat_interleave(32, 1)[:, :columns]
    assert ((dense - weight).abs() <= step * 1.001).all()
    assert share_moved(packed.dense_weight(), weight) < {8: 0.01, 4: 0.15}[bits]
    assert torch.equal(Blocks.stack([packed, packed]).dense_weight(), torch.cat([dense, dense]))


def quantised_by_hand(x: np.ndarray) -> np.ndarray:
    """Inputs in 8 bits as the ONNX standard defines DynamicQuantizeLinear, in float32."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.round(-low / scale), 0, 255)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def test_channels_multiply_inputs_in_8_bits_by_the_nearest_points():
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 64, generator=draws) * torch.tensor([1e-3, 1.0, 10.0, 0.0, 1.0])[:, None]
    weight[:, ::3] = 0
    packed = Channels.from_dense(weight)
    dense = packed.dense_weight()
    assert ((dense - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert not dense[weight == 0].any() and not torch.signbit(dense[dense == 0]).any()
    assert torch.equal(Channels.stack([packed, packed]).dense_weight(), torch.cat([dense, dense]))
    grid = make_grid(weight / 3, weight != 0, "int8", None)
    points = rounded(weight, weight != 0, grid)
    assert torch.equal(Channels.on_grid(points, grid).dense_weight(), points)
    program = parsed("y = MatMul (x, w)", {"w": weight.T.numpy()}, {"x": [7, 64]})
    use_nbits_(program, {"w": packed}, [])
    x = torch.randn(7, 64, generator=draws).numpy() + 0.5
    expected = quantised_by_hand(x).astype(np.float64) @ dense.numpy().T.astype(np.float64)
    np.testing.assert_allclose(run(program, x=x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("quantise", "group"), [("int8", None), ("int4", 64), ("int8", 128)])  # of 64 columns
def test_a_dense_model_runs_on_onnx_runtimes_own_operator(tiny, tmp_path, quantise, group):
    result, _ = export(tiny("llama"), tmp_path / "out", format="onnx", quantise=quantise, group=group)
    assert result.checks["weights"] == quantise
    assert 0 < result.checks["largest_rounding_error"] < 0.2
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert products and not [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored]
    assert not [name for name, array in stored.items() if array.dtype == np.float32 and array.shape == (256, 64)]
    widths = [{a.name: a.i for a in node.attribute}["bits"] for node in products]
    assert set(widths) == {WIDTHS[quantise], 8} and widths.count(8) >= 1  # the head has 8 bits
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")  # without this package's library


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int4", "row"), ("int8", None)])
def test_a_dense_model_keeps_its_grids_in_onnx_runtimes_own_operator(pruned, tmp_path, kind, group) -> None:
    source = pruned("llama", "dense", quantise=kind, group=group)
    for options in (ON_KERNELS | {"quantise": kind}, {"format": "bitmask-int4"}):
        with pytest.raises(UsageError, match="rounded with --pattern dense, so it has no zeros to pack"):
            export(source, tmp_path / "out", **options)
    result, _ = export(source, tmp_path / "out", format="onnx", quantise=kind)
    assert result.checks["largest_rounding_error"] < 1e-6


@pytest.mark.parametrize(("kind", "kernels", "layers"), [("gpt2", True, 8), ("opt", False, 12)])
def test_products_that_are_traced_as_gemms_are_rounded_too(kind, kernels, layers, pruned, tmp_path) -> None:
    result, folder = export(pruned(kind), tmp_path / "out", format="onnx", quantise="int8", kernels=kernels)
    assert result.checks["graph"] == "plain" and result.checks["layers_checked"] == layers
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored]
    if kernels:
        assert len(weights_in(folder)) == layers + 1  # and the head
    else:
        assert sum(node.op_type == "MatMulNBits" for node in graph.node) == layers + 1


def test_options_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="give no other dtype"):
        ExportSettings(**ON_KERNELS, quantise="int8", dtype="float16")
    with pytest.raises(ValueError, match="group would do nothing without quantise"):
        ExportSettings(**ON_KERNELS, group=64)
