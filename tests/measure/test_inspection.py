import pytest
import torch
from PIL import Image

from gblm_compress.measure import inspection
from gblm_compress.measure.inspection import inspect, kinds_of, report
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource


def test_report_finds_the_structure() -> None:
    weight = torch.ones(4, 16)
    weight[:, 1::2] = 0  # 1:2, and so every second column is empty
    weight[3] = 0
    layer = report("x", weight)
    assert (layer.nonzeros, layer.empty_rows, layer.empty_columns) == (24, 1, 8)
    assert set(layer.patterns) == {"1:2", "2:4", "4:8", "8:16"} and report("x", torch.ones(4, 32)).patterns == ()
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


def test_a_picture_is_of_the_weights_of_each_input_that_survive(pruned, tmp_path, progress, monkeypatch) -> None:
    drawn, draw = {}, inspection.draw
    monkeypatch.setattr(inspection, "draw", lambda columns, title: drawn.update(columns) or draw(columns, title))
    source = ModelSource("p $\\frac{$ 模 \n\x1b[31m", pruned("gpt2", "2:4").folder)  # no formula, no known letter
    result = inspect(source, progress, tmp_path / "map.png")
    assert len(result.layers) == 8 and all("2:4" in layer.patterns for layer in result.layers)
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG" and picture.width > 400 and picture.height > 200
    of_inputs = load_model(source).transformer.h[0].mlp.c_fc.weight.tolist()  # a Conv1D, [in_features, out_features]
    shares = [sum(value != 0 for value in row) / len(row) for row in of_inputs]
    assert len(drawn) == 8 and drawn["transformer.h.0.mlp.c_fc"].tolist() == pytest.approx(shares)
