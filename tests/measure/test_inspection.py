import torch

from gblm_compress.measure.inspection import inspect, report


def test_report_finds_the_structure() -> None:
    weight = torch.ones(4, 16)
    weight[:, 1::2] = 0  # 1:2, and so every second column is empty
    weight[3] = 0
    layer = report("x", weight)
    assert (layer.nonzeros, layer.empty_rows, layer.empty_columns) == (24, 1, 8)
    assert set(layer.patterns) == {"1:2", "2:4", "4:8", "8:16"}
    assert report("x", torch.ones(4, 32)).patterns == ()


def test_a_pruned_folder(pruned, progress) -> None:
    result = inspect(pruned("gpt2", "2:4"), progress)
    assert len(result.layers) == 8 and result.nonzeros == result.weights // 2
    assert all("2:4" in layer.patterns for layer in result.layers)
