import struct

import pytest
import torch

from gblm_compress.errors import UsageError
from gblm_compress.inspection import inspect, report, survivors
from gblm_compress.pruning import prune
from gblm_compress.settings import CalibrationSettings, PruneSettings
from gblm_compress.sources import ModelSource


def test_report_finds_the_structure() -> None:
    weight = torch.ones(4, 16)
    weight[:, 1::2] = 0  # 1:2, and so every second column is empty
    weight[3] = 0
    layer = report("x", weight)
    assert (layer.nonzeros, layer.empty_rows, layer.empty_columns) == (24, 1, 8)
    assert set(layer.patterns) == {"1:2", "2:4", "4:8", "8:16"}
    assert layer.row_spread == torch.tensor([0.5, 0.5, 0.5, 0.0]).std(correction=0)


def test_dense_weights_hold_no_pattern() -> None:
    assert report("x", torch.ones(4, 32)).patterns == ()


def test_survivors_average_over_cells() -> None:
    weight = torch.zeros(8, 8)
    weight[:4, :4] = 1
    weight[4:, 4:6] = 1
    assert survivors(weight, bins=2).tolist() == [[1.0, 0.0], [0.0, 0.5]]
    assert survivors(torch.ones(3, 200), bins=96).shape == (3, 96)


def test_a_pruned_folder_and_its_picture(tiny, tmp_path, progress) -> None:
    settings = PruneSettings(method="magnitude", pattern="2:4")
    prune(tiny("gpt2"), tmp_path / "p", settings, CalibrationSettings(), progress=progress)
    result = inspect(ModelSource("p", tmp_path / "p"), tmp_path / "map.png", progress)
    assert len(result.layers) == 8
    assert result.nonzeros == result.weights // 2
    assert all("2:4" in layer.patterns for layer in result.layers)
    header = (tmp_path / "map.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UsageError, match="heat map .* cannot be written"):
        inspect(ModelSource("p", tmp_path / "p"), tmp_path / "map.png" / "below.png", progress)
    width, height = struct.unpack(">II", header[16:])
    assert width > 400 and height > 200
