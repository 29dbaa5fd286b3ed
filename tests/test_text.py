import random

import pytest
import torch

from gblm_compress import text
from gblm_compress.errors import DataError
from gblm_compress.text import (
    calibration_windows,
    consecutive_windows,
    demo_paragraphs,
    fingerprint,
    load_text,
    random_windows,
    tokenize,
)
from gblm_compress.tiny import byte_tokenizer


def test_demo_parts_are_disjoint_real_prose() -> None:
    calibration, evaluation = demo_paragraphs("calibration"), demo_paragraphs("evaluation")
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration)
    assert 2 < sum(map(len, calibration)) / sum(map(len, evaluation)) < 4
    assert sum(map(len, evaluation)) > 50_000
    assert any("augmented assignment" in paragraph for paragraph in calibration + evaluation)


def test_windows_are_drawn_as_the_reference_draws_them() -> None:
    ids = torch.arange(1000)
    generator = random.Random(7)
    expected = []
    for _ in range(5):
        i = generator.randint(0, 1000 - 64 - 1)
        expected.append(list(range(i, i + 64)))
    assert [w[0].tolist() for w in random_windows(ids, 5, 64, 7, "x")] == expected
    assert fingerprint(random_windows(ids, 5, 64, 7, "x")) == fingerprint(random_windows(ids, 5, 64, 7, "x"))
    assert fingerprint(random_windows(ids, 5, 64, 8, "x")) != fingerprint(random_windows(ids, 5, 64, 7, "x"))


def test_c4_is_drawn_document_by_document_as_the_reference_does(monkeypatch) -> None:
    """The loop of GBLM-Pruner's lib/data.py (get_c4), on documents of which some are too short."""
    tokenizer = byte_tokenizer()
    documents = [{"text": f"{i:02} " * (3 + 7 * (i % 4))} for i in range(20)]
    asked = []

    def dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return documents

    monkeypatch.setattr("datasets.load_dataset", dataset)
    generator = random.Random(3)
    expected = []
    for _ in range(6):
        while True:
            ids = tokenizer(documents[generator.randint(0, 19)]["text"])["input_ids"]
            if len(ids) > 30:
                break
        i = generator.randint(0, len(ids) - 30 - 1)
        expected.append(ids[i : i + 30])
    windows = calibration_windows(tokenizer, "c4", 6, 30, 3)
    assert [window[0].tolist() for window in windows] == expected
    assert asked == [(("allenai/c4",), {"data_files": {"part": "en/c4-train.00000-of-01024.json.gz"}, "split": "part"})]
    monkeypatch.setattr(text, "DRAWS", 50)
    with pytest.raises(DataError, match="none of 50 documents drawn has more than 500 tokens"):
        calibration_windows(tokenizer, "c4", 1, 500, 3)


def test_consecutive_windows_do_not_overlap_and_drop_the_rest() -> None:
    windows = consecutive_windows(torch.arange(35), 8, None, "x")
    assert windows.flatten().tolist() == list(range(32)) and windows.shape == (4, 8)
    assert consecutive_windows(torch.arange(35), 8, 2, "x").shape == (2, 8)


@pytest.mark.parametrize("cut", [random_windows, consecutive_windows])
def test_a_text_shorter_than_a_window_is_refused(cut) -> None:
    arguments = (3, 64, 0) if cut is random_windows else (64, None)
    with pytest.raises(DataError, match="'short' gives 10 tokens, but one window needs 6"):
        cut(torch.arange(10), *arguments, "short")


def test_local_files(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["three", "four"]}), tmp_path / "c.parquet")
    assert load_text(str(tmp_path / "a.txt"), "evaluation") == "plain text"
    assert load_text(str(tmp_path / "b.jsonl"), "calibration") == "one\n\ntwo"
    assert load_text(str(tmp_path / "c.parquet"), "calibration") == "three\n\nfour"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("empty.txt", b"  \n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00\x80", "cannot be read as UTF-8"),
        ("broken.jsonl", b"{not json", "cannot be read"),
        ("column.jsonl", b'{"body": "x", "id": 3}\n', "has no column 'text'; it has 'body', 'id'"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("file.csv", b"a,b", "give a .txt, .jsonl or .parquet file"),
    ],
)
def test_unusable_files_are_data_errors(tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(str(tmp_path / name), "calibration")


def test_tokenize_takes_the_text_whole() -> None:
    assert tokenize(byte_tokenizer(), "ab ab").tolist() == byte_tokenizer()("ab ab")["input_ids"]
    assert len(tokenize(byte_tokenizer(), "é" * 3000)) == 6000


@pytest.mark.parametrize("source", ["demo", "wikitext2", "c4", "owner/name:config@split"])
def test_a_look_at_a_text_reads_nothing(source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if ":" not in source:
        (tmp_path / source).mkdir()  # a folder of that name does not stand in its way
    text.check_source(source)


def test_a_look_at_a_text_misses_what_is_not_there(tmp_path) -> None:
    for name in ("gone.txt", "gone.parquet", "."):
        with pytest.raises(DataError, match="no such file|file that exists"):
            text.check_source(str(tmp_path / name))
    assert text.is_here("demo") and text.is_here("x.jsonl") and not text.is_here("c4")
