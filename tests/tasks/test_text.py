import itertools
import os
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from gblm_compress import tasks
from gblm_compress.errors import DataError
from gblm_compress.models.loading import config_of, load_processor
from gblm_compress.tasks import text
from gblm_compress.tasks.text import demo_paragraphs, load_text
from tests.tasks.families import table

WHOLE = table(text=["word " * 1000] * 100)
CUT = (WHOLE[:-1], WHOLE[:4] + WHOLE[500:], WHOLE[:40] + b"\xff" * 40 + WHOLE[80:])
TWICE = table(pyarrow.table([["a"], ["b"]], names=["text", "text"]))


def test_demo_parts_are_disjoint_real_prose() -> None:
    calibration, evaluation = demo_paragraphs("calibration"), demo_paragraphs("evaluation")
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration)
    assert 2 < sum(map(len, calibration)) / sum(map(len, evaluation)) < 4
    assert sum(map(len, evaluation)) > 50_000
    assert any("augmented assignment" in paragraph for paragraph in calibration + evaluation)


def test_local_files(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": null, "n": 1}\n{"text": "tw\\u00f6"}'
    )
    (tmp_path / "c.parquet").write_bytes(table(text=["three", None, "four"]))
    assert load_text(str(tmp_path / "a.txt"), "evaluation") == "plain text"
    assert load_text(str(tmp_path / "b.jsonl"), "calibration") == "one\n\ntwö"
    assert load_text(str(tmp_path / "c.parquet"), "calibration") == "three\n\nfour"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00\x80", "cannot be read .*utf-8"),
        ("broken.jsonl", b"{not json", r"broken.jsonl', line 1 cannot be read as JSON \(Expecting property name"),
        ("column.jsonl", b'{"body": "x", "id": 3}\n', "line 1 has no column 'text'; it has 'body', 'id'"),
        ("list.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3 is not an object"),
        ("number.jsonl", b'{"text": 5}\n', "line 1: its 'text' is int, not text"),
        ("empty.jsonl", b'\n{"text": null}\n', "holds no text"),
        ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 cannot be read as JSON .*0xff"),
        ("deep.jsonl", b"[" * 100_000, "line 1 cannot be read as JSON .*recursion"),
        ("half.jsonl", b'{"text": "\\ud800"}', "line 1: its 'text' is not valid Unicode"),
        ("list.parquet", table(text=[["a"]]), "its 'text' is list, not text"),
        ("twice.parquet", TWICE, "has 2 columns 'text'; give each its own name"),
        ("rows.parquet", table(text=pyarrow.array([], pyarrow.string())), "holds no text"),
        *((f"{at}.parquet", cut, "cannot be read") for at, cut in enumerate(CUT)),
        ("file.csv", b"a,b", "give a .txt, .jsonl or .parquet file"),
    ],
)
def test_unusable_files_are_data_errors(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(str(tmp_path / name), "calibration")


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    Path("folder.jsonl").mkdir()
    Path("device.parquet").symlink_to("/dev/zero")
    Path("loop.txt").symlink_to("loop.txt")
    for name in ("pipe.txt", "folder.jsonl", "device.parquet"):
        with pytest.raises(DataError, match="is not a file"):
            load_text(name, "evaluation")
    for name in ("loop.txt", "gone.parquet", "~nobody-of-that-name/a.txt", "a" * 5000 + ".txt", "a\0b.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            load_text(name, "evaluation")
    with pytest.raises(DataError, match="is a folder; give a .txt"):
        load_text(".", "evaluation")


def test_what_takes_more_memory_than_fits_is_refused(tmp_path, monkeypatch) -> None:
    """Rows of a .parquet file that repeat one text: it is in memory once, and the sum over them is bounded."""
    path, length = tmp_path / "a.parquet", 1 << 20
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), ["a" * length])
    parquet.write_table(pyarrow.table({"text": repeated}), path, compression="zstd", store_schema=False)
    del repeated
    before = pyarrow.total_allocated_bytes()
    texts = text._of_parquet(path, "a", ("text",))
    assert next(iter(texts))[1] == {"text": "a" * length}
    assert pyarrow.total_allocated_bytes() - before < 8 * length
    monkeypatch.setattr(text, "MAX_PARQUET", 8 * length)
    with pytest.raises(DataError, match="holds more than 8,388,608 bytes of text; give a part of it"):
        load_text(str(path), "calibration")
    monkeypatch.setattr(text, "MAX_LINE", 100)
    with pytest.raises(DataError, match="a text of more than 100 bytes is too long"):
        load_text(str(path), "calibration")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * 100)
    with pytest.raises(DataError, match="line 2: more than 100 bytes"):
        load_text(str(tmp_path / "a.jsonl"), "evaluation")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ValueError(""), DataError, r"cannot be read \(ValueError\)"),
        (RuntimeError("Dataset scripts are no longer supported"), DataError, "no longer supported"),
        (MemoryError(), MemoryError, None),
    ],
)
def test_what_the_hub_raises(monkeypatch, raised, expected, message) -> None:
    def documents():
        yield {"text": "a"}
        raise raised

    for load in (lambda *args, **kwargs: documents(), lambda *args, **kwargs: list(documents())):
        monkeypatch.setattr("datasets.load_dataset", load)
        with pytest.raises(expected, match=message):
            load_text("owner/name", "evaluation")


@pytest.mark.parametrize("source", ["owner/name:config@train", "c4"])
def test_a_hub_dataset_without_end_is_read_as_far_as_it_is_wanted(source, monkeypatch, tiny) -> None:
    read = []

    def documents():
        for number in itertools.count():
            read.append(number)
            yield {"text": f"The {number}th document is of ten words and no more."}

    def dataset(*args, streaming: bool, **kwargs):
        assert streaming
        return documents()

    monkeypatch.setattr("datasets.load_dataset", dataset)
    prose = load_text(source, "calibration", 100)
    assert 800 < len(prose) < 900 and prose.startswith("The 0th") and prose.count("\n\n") + 1 == len(read)
    task, processor = tasks.TASKS["causal-lm"], load_processor(tiny("llama"))
    config = config_of(tiny("llama"))
    assert len(task.training(processor, config, source, 16, 160)) >= 10
    if source != "c4":  # which is drawn from document by document
        assert len(task.calibration(processor, config, source, 3, 16, 0)) == 3
        assert len(task.evaluation(processor, config, source, 16, 5)) == 5
    assert len(read) < 300


def test_a_look_at_a_text_reads_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()  # a folder of that name does not stand in its way
    for source in ("demo", "wikitext2", "c4", "owner/name:config@split"):
        assert text.data_files(source) == []
    (tmp_path / "x.jsonl").touch()
    assert text.data_files("x.jsonl") == [Path("x.jsonl")]
    assert tasks.is_here("demo") and tasks.is_here("x.jsonl") and not tasks.is_here("c4")


def test_without_a_network_a_hub_dataset_is_refused_at_once(monkeypatch) -> None:
    """What was fetched before is read."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"'c4' is on the Hugging Face hub, .* give a text file .*, 'demo', or, .* 'self'$"
    ):
        load_text("c4", "calibration", 100)
    assert time.monotonic() - start < 5 and not constants.HF_HUB_OFFLINE

    def fetched_before(**arguments):
        assert constants.HF_HUB_OFFLINE
        return [{"text": "a"}]

    monkeypatch.setattr("datasets.load_dataset", fetched_before)
    assert load_text("wikitext2", "evaluation") == "a"
