"""Results on terminals of several widths."""

import io

import pytest

from gblm_compress.cli import summaries
from gblm_compress.printing import PlainConsole
from gblm_compress.printing import table as make_table
from gblm_compress.runs import tables
from tests.runs.reports import report

SENTENCE = "a note of several words that is longer than a line of a narrow terminal, and names /a/path/" + 80 * "x"


def shown(parts, width: int, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    console = PlainConsole(file=file, width=width, force_terminal=terminal, color_system=None)
    for part in parts:
        console.show(part)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_of_a_run_is_wider_than_the_terminal(width: int) -> None:
    for line in shown(summaries.run(report()), width):
        assert len(line) <= width, line


def test_the_tables_of_a_run_fit_eighty_columns_as_tables() -> None:
    for table in tables.of(report()):
        lines = shown(summaries.titled(table), 80)
        assert "─" in "".join(lines), lines


def test_a_table_that_does_not_fit_is_stacked_and_loses_nothing() -> None:
    rows = [("model.layers.0.self_attn.q_proj", "64×64", "2:4"), ("model.layers.0.mlp.up_proj", "", "none")]
    table = make_table(("layer", ">shape", "patterns that hold"), rows)
    assert shown([table], 40) == [
        "model.layers.0.self_attn.q_proj",
        "  shape 64×64, patterns that hold 2:4",
        "model.layers.0.mlp.up_proj",
        "  patterns that hold none",
    ]
    assert len(shown([table], 80)) == 4


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


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("prune", {"model": "my MODELS"}, "evaluate MODELS/pruned --baseline 'my MODELS'"),
        ("recover", {"teacher": "MODELS/dense"}, "evaluate MODELS/pruned --baseline MODELS/dense"),
        ("generate", {"model": "demo"}, "prune demo -o pruned --calibration MODELS/text.txt"),
        ("export", {"model": "MODELS/dense"}, "benchmark MODELS/pruned --baseline MODEL"),
    ],
)
def test_the_next_command_has_the_paths_of_the_call(command: str, given, words: str, capsys, monkeypatch) -> None:
    monkeypatch.setitem(summaries.SUMMARIES, command, lambda _: ["summary"])
    summaries.show(command, {"folder": "MODELS/pruned", "file": "MODELS/text.txt"}, False, given)
    assert capsys.readouterr().out == f"summary\nnext: gblm-compress {words}\n"
