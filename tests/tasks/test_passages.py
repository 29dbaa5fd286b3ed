import json

import pyarrow
import pytest
from pyarrow import parquet

from gblm_compress.errors import DataError
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.tasks import passages
from gblm_compress.tasks.passages import Row
from tests.conftest import tiny_config
from tests.tasks import families

PROSE = "one two three four five six"


def test_lines_that_are_no_sentence_are_left_out(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        f'<doc id="1" title="x y z w v u">\n = A title of five words =\n{PROSE}\n\nshort\n{PROSE}\n</doc>\n'
    )
    assert passages.read(str(path), "calibration") == [Row((PROSE,))]
    path.write_text("too short\n")
    with pytest.raises(DataError, match="holds no passage of 5 words or more"):
        passages.read(str(path), "calibration")


def test_documents_of_a_table_are_cut_and_rows_are_not(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": f"{PROSE}\n{PROSE} seven"}) + "\n\n")
    assert [row.texts for row in passages.read(str(path), "calibration")] == [(PROSE,), (f"{PROSE} seven",)]
    path.write_text(json.dumps({"text": f"{PROSE}\nshort", "label": 1}))
    assert [(row.texts, row.label) for row in passages.read(str(path), "calibration")] == [((f"{PROSE}\nshort",), 1)]


def test_all_kinds_of_files_give_the_same_rows(tmp_path) -> None:
    rows = [{"sentence1": "a, b", "sentence2": "c", "score": 1.5}, {"sentence1": "d", "sentence2": "e", "score": 0.0}]
    (tmp_path / "head.csv").write_text('sentence1,sentence2,score\n"a, b",c,1.5\nd,e,0\n')
    (tmp_path / "none.csv").write_text('"a, b",c,1.5\nd,e,0\n')
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "other": 1} for row in rows]), tmp_path / "a.parquet")
    for name in ("head.csv", "none.csv", "a.jsonl", "a.parquet"):
        found = passages.table(str(tmp_path / name), "evaluation")
        assert [(row.texts, row.score) for row in found] == [(("a, b", "c"), 1.5), (("d", "e"), 0.0)], name


def test_a_label_may_be_written_as_another_kind_of_number(tmp_path) -> None:
    given = [True, 2.0, 2.5, "3", None]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": PROSE, "label": label}) for label in given))
    found = passages.table(str(path), "evaluation")
    read = [(repr(row.label), row.score) for row in found]
    assert read == [("1", None), ("2", 2.0), ("None", 2.5), ("3", None), ("None", None)]


def test_pairs_and_single_texts_are_not_mixed(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": PROSE, "text_pair": PROSE, "label": 0}, {"text": PROSE, "label": 1}]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer, config = byte_tokenizer(), tiny_config("llama")
    with pytest.raises(DataError, match="line 2 has 1 texts, but .*line 1 has 2; give all rows equally"):
        passages.encode(tokenizer, config, passages.table(str(path), "evaluation"), 16, pad=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n", r"line 1 has no known text column \(columns: 'a', 'b'\); name it 'text' or 'sentence'"),
        (b"sentence1,sentence2,score\na,b,high\n", "line 2: the score 'high' is not a number"),
        (b"text,label,text\na,1,b\n", "line 1 has 2 columns 'text'; give each its own name"),
        (b"text,label\na,b,1\n", "line 2 has 3 columns, but the first line has 2"),
        (b"words,label\na,1\n", r"line 2 has no known text column \(columns: 'words', 'label'\); name it 'text' or"),
        (b"", "holds no text"),
        (b"text\n\xff", "a.csv' cannot be read .*utf-8"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, content, message) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        passages.table(str(tmp_path / "a.csv"), "evaluation")


def test_texts_are_cut_to_what_model_and_tokenizer_take() -> None:
    config = families.config_of("roberta")
    assert passages.positions_of(config) == 128  # two of 130 are those before the first token
    rows = [Row(("x" * 500,)), Row(("abc",))]
    padded = passages.encode(families.tokenizer(), config, rows, 1000, pad=True)
    assert [tuple(sample["input_ids"].shape) for sample in padded] == [(1, 128)] * 2
    assert padded[1]["attention_mask"].sum() == 3 and "token_type_ids" not in padded[0]
    alone = passages.encode(families.tokenizer(), config, rows, 16, pad=False)
    assert [sample["input_ids"].shape[1] for sample in alone] == [16, 3]
