import os
import stat
from pathlib import Path

import pytest

from gblm_compress.artifact import atomic_folder, check_output, write_text
from gblm_compress.errors import UsageError


def test_success_replaces_and_leaves_nothing_beside(tmp_path) -> None:
    target = tmp_path / "a" / "out"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(content)
            (folder / "file").chmod(0o600)
            assert not target.exists() or (target / "file").read_text() == "one"
        assert (target / "file").read_text() == content
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((target / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask


def test_failure_leaves_what_was_there(tmp_path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "file").write_text("new")
        raise ZeroDivisionError
    assert (target / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_check_output(tmp_path) -> None:
    check_output(tmp_path / "new" / "deep", force=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", force=True)
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(tmp_path / "file" / "below", force=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=False)
    with pytest.raises(UsageError, match="--force"):
        check_output(tmp_path, force=False)
    check_output(tmp_path, force=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses even root")
@pytest.mark.parametrize("folder", [".", "..", "../here"])
def test_the_folder_one_is_in_is_not_replaced(folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="is where you are"):
        check_output(Path(folder), force=True)
    check_output(Path("new"), force=False)


def test_a_place_where_nothing_can_be_created() -> None:
    with pytest.raises(UsageError, match="'/proc/new' cannot be written: .* in '/proc'"):
        check_output(Path("/proc/new"), force=False)


def test_write_text_is_whole_or_nothing(tmp_path) -> None:
    write_text(tmp_path / "x", "content")
    assert (tmp_path / "x").read_text() == "content"
    with pytest.raises(UsageError, match="cannot be written"):
        write_text(tmp_path / "gone" / "x", "content")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
