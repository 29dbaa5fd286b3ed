"""Results on terminals of several widths."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gblm_compress.cli import summaries
from gblm_compress.printing import PlainConsole
from gblm_compress.printing import table as make_table
from gblm_compress.runs import tables
from gblm_compress.runs.report import ReportResult
from tests.runs.reports import report

SENTENCE = "a note of several words that is longer than a line of a narrow terminal, and names /a/path/" + 80 * "x"


def shown(parts, width: int, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    console = PlainConsole(file=file, width=width, force_terminal=terminal, color_system=None)
    for part in parts:
        console.show(part)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80])
def test_a_run_is_as_narrow_as_the_terminal_and_from_80_columns_on_in_tables(width: int) -> None:
    lines = shown(summaries.run(report()), width)
    assert max(map(len, lines)) <= width
    assert "reused: export bitmask" in lines and lines[-1].endswith("batch 1.") and "FAIL: 40 %" in " ".join(lines)
    for table in tables.of(report()):
        assert width < 80 or "─" in "".join(shown(summaries.titled(table), width))


def test_a_table_that_does_not_fit_is_stacked_and_loses_nothing() -> None:
    rows = [("0.self_attn.q_proj", "64×64", "2:4"), ("up_proj", "", "none")]
    table = make_table(("layer", ">shape", "patterns that hold"), rows)
    stacked = ["0.self_attn.q_proj", "  shape 64×64, patterns that hold 2:4", "up_proj", "  patterns that hold none"]
    assert shown([table], 40) == stacked and len(shown([table], 80)) == 4


def test_sentences_break_between_words_and_paths_not_at_all() -> None:
    lines = shown([SENTENCE], 40)
    assert " ".join(lines) == SENTENCE and lines[-1] == "/a/path/" + 80 * "x"
    assert all(len(line) <= 40 for line in lines[:-1])
    assert shown([SENTENCE], 40, terminal=False) == [SENTENCE]


def test_what_ran_is_said_once_for_all_batch_sizes_that_ran_it() -> None:
    def of(batch, prefill, decode):
        return {"model": "m", "batch": batch, "prefill_kernels": {prefill: 2}, "decode_kernels": {decode: 2}}

    assert summaries.kernel_lines([of(1, "many", "few"), of(2, "many", "few"), of(16, "many", "many")]) == [
        "m: prefill on 2 × many; decode on 2 × few (batch 1, 2)",
        "m: prefill and decode on 2 × many (batch 16)",
    ]


SPREADS = {"row_spread": 0.0, "column_spread": 0.5, "empty_rows": 0, "empty_columns": 1}
LAYER = {"name": "layers.0.up", "shape": [4, 8], "nonzeros": 16, "patterns": ["2:4"], **SPREADS}
LINES = dict.fromkeys(("kept_rows", "gone_rows", "kept_columns", "gone_columns"), 0)
KINDS = [{"kind": "up", "layers": 2, "nonzeros": 0.5, **LINES}]
LAYERS = [LAYER, LAYER | {"name": "layers.1.up", "patterns": []}]
INSPECTED = {"layers": LAYERS, "kinds": KINDS, "nonzeros": 32, "weights": 64, "heat_map": None}


def test_an_inspection_shows_its_summary_first_and_layers_if_asked_to() -> None:
    short, long = (shown(summaries.inspect(INSPECTED, layers), 160) for layers in (False, True))
    assert short[:2] == ["32 of 64 weights are nonzero (50.00%)", "patterns that hold: 2:4 in 1 of 2 layers"]
    assert short[-1] == "--layers shows every layer" and "layers.1.up" not in " ".join(short)
    assert long[: len(short) - 1] == short[:-1] and long[-1].startswith("layers.1.up") and long[-1].endswith("none")
    assert shown(summaries.inspect(INSPECTED | {"layers": LAYERS[1:]}), 160)[1] == "patterns that hold: none"


def test_an_export_shows_sizes_with_units() -> None:
    checks = {"packed_bytes": 160256, "packed_layers": 14, "tolerance": 0.0001}
    exported = {"format": "bitmask", "bytes": 230_700, "source_bytes": 364_000, "checks": checks}
    lines = shown(summaries.export(exported | {"seconds": 1.0, "folder": "x"}), 80)
    sizes = ["size           230.7 kB (source 364.0 kB)", "packed         160.3 kB"]
    assert lines[1:5] == [*sizes, "packed layers  14", "tolerance      0.0001"]


def test_an_evaluation_shows_its_data_and_a_note_on_them() -> None:
    measured = {"metrics": [], "fidelity": None, "zero_shot": None, "dtype": "float32", "provider": "cpu"}
    data = {"dataset": "demo", "windows": 1, "sample": "window", "sequence_length": 8, "note": "as before"}
    assert shown(summaries.evaluate(measured | data), 80) == [
        "data         demo: 1 window of 8 tokens",
        "note         as before",
        "computed in  float32 on cpu",
    ]


ON_DEMO = "--dataset demo --sequence-length 512 --max-windows 16"
FOUND = {
    "folder": "a/pruned", "sample": "window", "ok": True, "nonzeros": 60, "weights": 80, "advised": {"kind": "pruned"},
    "rows": [{"method": name, "pattern": "2:4", "perplexity": value} for name, value in (("gblm", 9), ("wanda", 8))],
}  # fmt: skip


def made(folder: Path, **manifest: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "gblm_manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("advise", {"model": "my MODELS", "pattern": "2:4"}, "prune 'my MODELS' -o pruned --pattern 2:4"),
        ("prune", {"model": "my MODELS"}, f"evaluate a/pruned --baseline 'my MODELS' {ON_DEMO}"),
        (
            "prune",
            {"model": "x", "calibration": "c4", "sequence_length": 64},
            "evaluate a/pruned --baseline x --dataset c4 --sequence-length 64 --max-windows 16",
        ),
        ("recover", {"teacher": "a/dense"}, f"evaluate a/pruned --baseline a/dense {ON_DEMO}"),
        ("evaluate", {"model": "a/pruned"}, "export a/pruned -o a/onnx --format onnx --quantise int8 --kernels"),
        ("evaluate", {"model": "a/rounded"}, "export a/rounded -o a/onnx --format onnx --quantise int4"),
        ("evaluate", {"model": "a/onnx"}, "benchmark a/onnx --baseline owner/model"),
        ("benchmark", {"models": ("a/onnx",), "baseline": ("x",)}, f"evaluate a/onnx --baseline x {ON_DEMO}"),
        ("inspect", {"model": "x"}, "export x -o onnx --format onnx --kernels"),
        ("compare", {"model": "x", "samples": 8}, "prune x -o pruned --method wanda --pattern 2:4 --samples 8"),
        ("validate", {"recipe": "my.yaml", "set": ["a.b=1"]}, "run my.yaml --set=a.b=1"),
        ("doctor", {}, "run quickstart"),
    ],
)
def test_the_next_command_has_the_paths_of_the_call(command, given, words, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kind in (("pruned", "pruned"), ("onnx", "export")):
        made(tmp_path / "a" / name, kind=kind, base_model={"name": "owner/model"}, prune={})
    made(tmp_path / "a" / "rounded", kind="pruned", prune={"pattern": "dense", "quantise": "int4"})
    monkeypatch.setitem(summaries.SUMMARIES, command, lambda _: ["summary"])
    for quiet in ({}, {"quiet": True}):
        summaries.show(command, FOUND, False, given | quiet)
        assert capsys.readouterr().out == "summary\n" + f"next: gblm-compress {words}\n" * (not quiet)


@pytest.mark.parametrize(
    ("name", "baseline"),
    [("demo", "demo"), ("owner/model", "owner/model"), ("here", "here"), ("elsewhere", "MODEL"), (None, "MODEL")],
)
def test_an_export_is_timed_against_the_model_that_its_manifest_names(name, baseline, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    made(tmp_path / "onnx", kind="export", prune={}, **({"base_model": {"name": name}} if name else {}))
    words = summaries.FOLLOWING["export"]({"folder": "onnx"}, {"model": "pruned"})
    assert words == ("benchmark", "onnx", "--baseline", baseline)


def test_a_dense_model_is_pruned_and_its_export_evaluated_and_not_timed_against_its_like(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "int8", kind="export")
    words = summaries.FOLLOWING["export"]({"folder": "int8"}, {"model": "my/model"})
    assert " ".join(words) == f"evaluate int8 --baseline my/model {ON_DEMO}"
    assert summaries.FOLLOWING["evaluate"]({"sample": "window"}, {"model": "int8"}) == ()
    words = summaries.FOLLOWING["evaluate"]({"sample": "text"}, {"model": "my/encoder", "dataset": "a.csv"})
    assert words == ("prune", "my/encoder", "-o", "pruned", "--calibration", "a.csv")
    own = {"kind": "quantised", "export": {"quantise": "int8", "kernels": True}}
    assert summaries.FOLLOWING["advise"]({"advised": own}, {"model": "x"})[-2:] == ("int8", "--kernels")
    assert summaries.FOLLOWING["inspect"](FOUND | {"nonzeros": 61}, {"model": "x"}) == ("prune", "x", "-o", "pruned")


def test_the_next_command_of_a_run_is_the_push_of_what_it_made(tmp_path) -> None:
    ran = replace(report(), output=str(tmp_path))
    (tmp_path / "bitmask").mkdir()
    for command, result in (("run", ran), ("report", ReportResult("report.html", [ran], None))):
        words = summaries.FOLLOWING[command](result, {"runs": [ran.output]})
        assert words == ("push", ran.output, "bitmask")
