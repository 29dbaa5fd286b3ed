"""Weights in ONNX Runtime's own blocks: torch with the numbers of the file gives the logits of the graph."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from gblm_compress.errors import UsageError, VerificationError
from gblm_compress.exporters import check, export
from gblm_compress.exporters.onnx_rounding import Blocks, restored
from gblm_compress.models import grids
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings

WIDTHS = {"int8": 8, "int4": 4}


def by_hand(levels: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The weight of a MatMulNBits, number by number, as ONNX Runtime's documentation of the operator has it."""
    rows, _, size = levels.shape
    group, weight = size * 8 // bits, np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            block, place = divmod(column, group)
            if bits == 8:
                level = int(levels[row, block, place])
            else:
                level = int(levels[row, block, place // 2]) >> (4 * (place % 2)) & 15
            weight[row, column] = (level - 2 ** (bits - 1)) * scales[row, block]
    return weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [64, 80])
def test_blocks_hold_the_nearest_points_and_zeros_as_zeros(bits, columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0
    packed = Blocks.from_dense(weight, bits, group=32)
    dense = packed.dense_weight()
    assert np.array_equal(dense.numpy(), by_hand(packed.levels, packed.scales, bits, columns))
    assert not dense[weight == 0].any() and not torch.signbit(dense[dense == 0]).any()
    step = torch.from_numpy(np.abs(packed.scales)).repeat_interleave(32, 1)[:, :columns]
    assert ((dense - weight).abs() <= step * 1.001).all()
    assert packed.error(weight) < {8: 0.01, 4: 0.15}[bits]
    assert torch.equal(Blocks.stack([packed, packed]).dense_weight(), torch.cat([dense, dense]))


def test_blocks_that_do_not_fit_their_scales_are_found():
    packed = Blocks.from_dense(torch.ones(2, 64), 4, group=32)
    with pytest.raises(VerificationError, match="do not fit"):
        restored(packed.levels, packed.scales[:, :1], 4, 64)
    with pytest.raises(VerificationError, match="do not fit"):
        restored(packed.levels, packed.scales, 4, 65)


@pytest.mark.parametrize(
    "options",
    [
        {"quantise": "int8"},
        {"quantise": "int4", "group": 64},
        {"quantise": "int8", "group": 128},  # of 64 columns
        {"quantise": "int4", "graph": "plain"},
    ],
    ids=["int8", "int4 by 64", "int8 by 128", "plain"],
)
def test_a_dense_model_runs_on_onnx_runtimes_own_operator(tiny, tmp_path, options):
    result = export(
        tiny("llama"), tmp_path / "out", ExportSettings(format="onnx", **options), progress=Progress(quiet=True)
    )
    assert result.checks["weights"] == options["quantise"]
    assert 0 < result.checks["largest_rounding_error"] < 0.2
    assert result.checks["logits_relative_difference"] < result.checks["logits_tolerance"]
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert products and not [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored]
    assert not [name for name, array in stored.items() if array.dtype == np.float32 and array.shape == (256, 64)]
    widths = [{a.name: a.i for a in node.attribute}["bits"] for node in products]
    assert set(widths) == {WIDTHS[options["quantise"]], 8} and widths.count(8) >= 1  # the head has 8 bits
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")  # without this package's library


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_products_that_are_traced_as_gemms_are_rounded_too(kind, tiny, tmp_path):
    result = export(
        tiny(kind), tmp_path / "out", ExportSettings(format="onnx", quantise="int8"), progress=Progress(quiet=True)
    )
    assert result.checks["graph"] == "plain"
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored]
    assert not products
    layers = {"gpt2": 8, "opt": 12}[kind]
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == layers + 1  # and the head


def test_what_onnx_runtime_has_no_place_for_is_refused_before_the_work(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="leave one out"):
        ExportSettings(format="onnx", quantise="int8", sparse=True)
    grid = grids.Grid(torch.ones(1, 1), torch.arange(-7, 8, dtype=torch.int8), 64)
    monkeypatch.setattr("gblm_compress.exporters.read_grids", lambda source: {"layer": grid})
    with pytest.raises(UsageError, match="pruned onto grids of 64, which ONNX Runtime does not have; add --kernels"):
        check(ModelSource("m", tiny("llama").folder), ExportSettings(format="onnx", quantise="int4"))
