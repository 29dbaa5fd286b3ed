import os
from pathlib import Path

import pytest

from gblm_compress.storage.paths import kind_of, local


def test_kinds(tmp_path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    kinds = {name: kind_of(tmp_path / name) for name in ("file", "pipe", "link", "dangling", "gone", "file/below")}
    assert kinds == {
        "file": "file", "pipe": "other", "link": "folder", "dangling": None, "gone": None, "file/below": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "~nobody-of-that-name/x", "\udcff\ud800", "", "\n"])
def test_no_name_raises(name: str) -> None:
    kind_of(local(name))


def test_home() -> None:
    assert local("~/x") == Path.home() / "x"
