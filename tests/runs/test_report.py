import json

from gblm_compress.printing import PlainConsole
from gblm_compress.runs import report
from gblm_compress.runs.gates import GateOutcome
from gblm_compress.runs.report import ModelSummary

NAME = "[/]$\\frac{$\x1b[2J\udcff<b>\n"


def summary() -> ModelSummary:
    values = {
        "model": NAME,
        "runtime": "torch",
        "batch": 1,
        "nonzero_fraction": 0.5,
        "bytes_on_disk": 10,
        "tpot_ms": 3.0,
    }
    return ModelSummary(**dict.fromkeys(ModelSummary.__dataclass_fields__) | values)


def test_names_from_outside_neither_end_nor_bend_the_report(tmp_path, capsys) -> None:
    """Markup, formulas, escapes and bytes that are no UTF-8, in the terminal, report.json, the page and the plot."""
    gates = [
        GateOutcome("min_decode_speedup", NAME, 1.3, measured, passed)
        for measured, passed in ((1.0, False), (2.0, True))
    ]
    console = PlainConsole(width=200, force_terminal=True, color_system="standard")
    console.print(report.table([summary()]))
    console.print(report.gate_table(gates))
    shown = capsys.readouterr().out
    assert shown.count(r"[/]$\frac{$\x1b[2J\udcff<b>\n") == 3
    assert "\x1b[2J" not in shown and "\x1b[1;31mno" in shown

    content = {
        "rows": [vars(summary())],
        "gates": [vars(gate) for gate in gates],
        "stages": [],
        "environment": {"cpu": NAME},
        "recipe": {"model": NAME},
    }
    report.write(content, tmp_path)
    assert json.loads((tmp_path / report.REPORT).read_text())["rows"][0]["model"] == NAME
    page = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    assert r"<td>[/]$\frac{$\x1b[2J\udcff&lt;b&gt;" in page and "\x1b" not in page
    assert 'src="data:image/png;base64,' in page
