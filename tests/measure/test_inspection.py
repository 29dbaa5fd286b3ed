import torch

from gblm_compress.measure.inspection import inspect, kinds_of, report


def test_report_finds_the_structure() -> None:
    weight = torch.ones(4, 16)
    weight[:, 1::2] = 0  # 1:2, and so every second column is empty
    weight[3] = 0
    layer = report("x", weight)
    assert (layer.nonzeros, layer.empty_rows, layer.empty_columns) == (24, 1, 8)
    assert set(layer.patterns) == {"1:2", "2:4", "4:8", "8:16"}
    assert report("x", torch.ones(4, 32)).patterns == ()
    assert layer.row_spread == torch.tensor([0.5, 0.5, 0.5, 0.0]).std(correction=0)


def test_kinds_sum_up_rows_and_columns_over_blocks() -> None:
    one, two = torch.zeros(10, 20), torch.zeros(10, 20)
    one[:9, :5] = 1  # five columns survive; a row has a quarter of its weights
    two[0] = two[:, 0] = 1  # a row and a column survive, and all others vanish
    layers = (report("h.0.mlp", one), report("h.1.mlp", two), report("h.0.attn", torch.ones(4, 4)))
    mlp, attention = kinds_of(layers)
    rows, columns = {"kept_rows": 1 / 20, "gone_rows": 10 / 20}, {"kept_columns": 6 / 40, "gone_columns": 34 / 40}
    assert mlp == {"kind": "mlp", "layers": 2, "nonzeros": (45 + 29) / 400, **rows, **columns}
    assert (attention["kept_rows"], attention["gone_columns"]) == (1, 0)


def test_a_pruned_folder(pruned, progress) -> None:
    result = inspect(pruned("gpt2", "2:4"), progress)
    assert len(result.layers) == 8 and result.nonzeros == result.weights // 2
    assert all("2:4" in layer.patterns for layer in result.layers)
