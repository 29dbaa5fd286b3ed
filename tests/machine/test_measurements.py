import json
import os

import pytest

from gblm_compress.machine import measurements
from gblm_compress.storage.paths import CACHE_VARIABLE


def any_number(value) -> bool:
    return type(value) is int


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measured_once_and_kept(folder) -> None:
    measured = []

    def measure() -> int:
        measured.append(1)
        return 5

    assert [measurements.remembered("machine", "shape", measure, any_number) for _ in range(2)] == [5, 5]
    measurements.recorded.cache_clear()  # as in a new process
    assert measurements.remembered("machine", "shape", measure, any_number) == 5
    assert len(measured) == 1
    assert measurements.remembered("another machine", "shape", lambda: 7, any_number) == 7
    assert json.loads((folder / measurements.FILE).read_text()) == {
        "machine": {"shape": 5},
        "another machine": {"shape": 7},
    }


def test_what_another_process_measured_is_not_lost(folder) -> None:
    measurements.remembered("machine", "shape", lambda: 1, any_number)
    path = folder / measurements.FILE
    path.write_text(json.dumps({"machine": {"shape": 1, "other": "theirs"}, "theirs": {"shape": 3}}))
    measurements.remembered("machine", "third", lambda: 2, any_number)
    assert json.loads(path.read_text()) == {
        "machine": {"shape": 1, "other": "theirs", "third": 2},
        "theirs": {"shape": 3},
    }


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    measurements.recorded.cache_clear()
    assert measurements.remembered("machine", "shape", lambda: 4, any_number) == 4


DAMAGED = {
    "empty": "",
    "cut": '{"machine": {"shape": 5',
    "no object": "[1, 2]",
    "nothing": "null",
    "no results": '{"machine": 3, "theirs": {"shape": 3}}',
    "of another type": '{"machine": {"shape": "five"}, "theirs": {"shape": 3}}',
    "not valid": '{"machine": {"shape": true}}',
    "deep": "[" * 100_000,
    "a number without end": '{"machine": {"shape": ' + "9" * 5000 + "}}",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_measured_and_written_again(folder, content) -> None:
    path = folder / measurements.FILE
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    measurements.recorded.cache_clear()
    assert measurements.remembered("machine", "shape", lambda: 5, any_number) == 5
    theirs = {"theirs": {"shape": 3}} if "theirs" in str(content) else {}
    assert json.loads(path.read_text()) == {"machine": {"shape": 5}} | theirs


def test_a_folder_or_a_pipe_in_its_place_is_left_alone(folder) -> None:
    path = folder / measurements.FILE
    for put in (path.mkdir, lambda: os.mkfifo(path)):
        folder.mkdir(exist_ok=True)
        put()
        measurements.recorded.cache_clear()
        assert measurements.remembered("machine", "shape", lambda: 5, any_number) == 5
        path.rmdir() if path.is_dir() else path.unlink()
