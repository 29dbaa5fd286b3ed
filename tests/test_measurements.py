import json

import pytest

from gblm_compress import measurements
from gblm_compress.sources import CACHE_VARIABLE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measured_once_and_kept(folder) -> None:
    measured = []

    def measure() -> int:
        measured.append(1)
        return 5

    assert [measurements.remembered("machine", "shape", measure) for _ in range(2)] == [5, 5]
    measurements._known.cache_clear()  # as in a new process
    assert measurements.remembered("machine", "shape", measure) == 5
    assert len(measured) == 1
    assert measurements.remembered("another machine", "shape", lambda: 7) == 7
    assert json.loads((folder / measurements.FILE).read_text()) == {
        "machine": {"shape": 5},
        "another machine": {"shape": 7},
    }


def test_what_another_process_measured_is_not_lost(folder) -> None:
    measurements.remembered("machine", "shape", lambda: 1)
    path = folder / measurements.FILE
    path.write_text(json.dumps({"machine": {"shape": 1, "other": "theirs"}, "theirs": {"shape": 3}}))
    measurements.remembered("machine", "third", lambda: 2)
    assert json.loads(path.read_text()) == {
        "machine": {"shape": 1, "other": "theirs", "third": 2},
        "theirs": {"shape": 3},
    }


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    measurements._known.cache_clear()
    assert measurements.remembered("machine", "shape", lambda: 4) == 4
