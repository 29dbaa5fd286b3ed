"""This machine: how busy it is, its caches, and measurements that are made once and kept."""

import json
import os
import signal
import subprocess
import sys
from unittest.mock import Mock, patch

import pytest

from gblm_compress import machine
from gblm_compress.machine import CACHE_VARIABLE


def test_a_core_that_works_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        found = max(machine.busy_cores(0.2) for _ in range(3))
        process.kill()
    assert 0.5 < found <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("busy", "given", "loaded", "spins"),
    [
        (1.0, {}, False, "3000"),
        (0.1, {}, False, None),
        (1.0, {"GOMP_SPINCOUNT": "7"}, False, "7"),
        (1.0, {"OMP_WAIT_POLICY": "active"}, False, None),
        (1.0, {}, True, None),  # too late
    ],
)
def test_threads_sleep_soon_beside_other_work_unless_told_otherwise(monkeypatch, busy, given, loaded, spins) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: busy)
    monkeypatch.setattr(sys, "modules", {"torch": None} if loaded else {})
    machine.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(("busy", "warning"), [(0.1, None), (1.34, "1.3 of 2 cores were busy with other work")])
def test_figures_that_were_measured_beside_other_work(busy, warning) -> None:
    said = machine.noisy({"cores": 2, "busy_cores": busy})
    assert said is warning or said.startswith(warning)


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [(("48K", "32K", "1024K", "32768K"), 32 << 20), (("64K", "2M"), 2 << 20), (("?", ""), 0), ((), 0)],
)
def test_the_largest_cache_counts(tmp_path, sizes, largest) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert machine.last_cache_bytes(tmp_path) == largest


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The file of measurements, as in a new process."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    machine.recorded.cache_clear()
    return tmp_path / "cache" / machine.MEASUREMENTS


def remembered(what: str, measure) -> int:
    return machine.remembered("machine", what, measure, lambda value: type(value) is int)


def test_measured_once_and_kept(path) -> None:
    measure = Mock(return_value=5)
    assert [remembered("shape", measure) for _ in range(2)] == [5, 5]
    machine.recorded.cache_clear()
    assert remembered("shape", measure) == 5 and measure.call_count == 1
    path.write_text(json.dumps({"machine": {"shape": 5, "other": "theirs"}, "theirs": {"shape": 3}}))
    assert remembered("third", lambda: 2) == 2  # what another process measured meanwhile is not lost
    found = json.loads(path.read_text())
    assert found == {"machine": {"shape": 5, "other": "theirs", "third": 2}, "theirs": {"shape": 3}}


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", '{"machine": 3, "theirs": {"shape": 3}}', '{"machine": {"shape": true}, "theirs": {"shape": 3}}'],
)
def test_what_is_damaged_is_measured_and_written_again(path, content) -> None:
    path.parent.mkdir()
    path.write_text(content)
    assert remembered("shape", lambda: 5) == 5
    theirs = {"theirs": {"shape": 3}} if "theirs" in content else {}
    assert json.loads(path.read_text()) == {"machine": {"shape": 5}} | theirs


@pytest.mark.parametrize("put", ["folder", "pipe", "file above"])
def test_a_cache_that_cannot_be_used_is_done_without(path, put) -> None:
    if put == "file above":
        path.parent.write_text("in the way of a folder")
    else:
        path.parent.mkdir()
        path.mkdir() if put == "folder" else os.mkfifo(path)
    assert remembered("shape", lambda: 4) == 4


KILLED = """
import os, sys
from pathlib import Path
from gblm_compress.machine import made_once
made_once(Path(sys.argv[1]), lambda folder: ((folder / "half").touch(), os.kill(os.getpid(), 9)))
"""


def test_a_folder_of_the_cache_is_made_again_after_a_kill(tmp_path) -> None:
    folder = tmp_path / "exports" / "one"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)])
    assert done.returncode == -signal.SIGKILL and len(list(folder.parent.iterdir())) == 2  # its lock, and the half
    machine.made_once(folder, lambda temporary: (temporary / "whole").touch())
    assert list(folder.parent.rglob("*")) == [folder, folder / "whole"]
    machine.made_once(folder, None)


def test_what_nobody_used_for_long_leaves_the_cache(tmp_path) -> None:
    for name in ("used", "old", "older", "new"):
        (tmp_path / name / "below").mkdir(parents=True)
    for name in ("used", "old", "older"):
        os.utime(tmp_path / name, (0, 0))
    with patch.object(machine.shutil, "rmtree", side_effect=PermissionError):  # another user's, or removed meanwhile
        machine.keep(tmp_path / "used")
    machine.keep(tmp_path / "used")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
    assert (tmp_path / "used").stat().st_mtime > 0
