"""Folders of results: whole or absent, written by one process at a time, replaced only if this program made them."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gblm_compress.errors import OutputError, UsageError
from gblm_compress.storage import outputs
from gblm_compress.storage.outputs import MANIFEST, atomic_folder, check_output, check_workable, reserved, working_in
from gblm_compress.storage.records import read_json


def make(target: Path, content: str = "content", force: bool = False) -> None:
    """A result as a stage makes it."""
    with reserved(target, force), atomic_folder(target, force=force) as folder:
        (folder / "file").write_text(content)
        (folder / "file").chmod(0o600)
        (folder / MANIFEST).write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_success_replaces_and_leaves_nothing_beside(tmp_path) -> None:
    target = tmp_path / "a" / "out"
    for content in ("one", "two"):
        make(target, content, force=True)
        assert (target / "file").read_text() == content
    assert names(tmp_path / "a") == ["out"]
    assert read_json(target / MANIFEST) == {"files": ["file", MANIFEST]}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_results_have_the_permissions_of_ordinary_files(umask, tmp_path, monkeypatch) -> None:
    before = os.umask(umask)
    monkeypatch.setattr(os, "umask", pytest.fail)  # of the whole process: other threads write meanwhile
    make(tmp_path / "out")
    monkeypatch.undo()
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_failure_leaves_what_was_there(tmp_path) -> None:
    target = tmp_path / "out"
    make(target, "old")
    with pytest.raises(ZeroDivisionError), reserved(target, True), atomic_folder(target, force=True) as folder:
        (folder / "file").write_text("new")
        raise ZeroDivisionError
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]
    with pytest.raises(ZeroDivisionError), reserved(tmp_path / "deep" / "er" / "out", force=False):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]


def test_only_what_this_program_made_is_replaced(tmp_path) -> None:
    make(tmp_path / "ours")
    with pytest.raises(UsageError, match="exists; give another folder, or --force"):
        make(tmp_path / "ours")
    (tmp_path / "ours" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex', which this program did not write"):
        make(tmp_path / "ours", force=True)
    (tmp_path / "ours" / "thesis.tex").unlink()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years")
    for content in (None, "{}", "[]", '{"files": "x"}', '{"files": ["thesis.tex"]}', '{"kind": "run"}', "{"):
        if content is not None:
            (tmp_path / "theirs" / MANIFEST).write_text(content)
        with pytest.raises(UsageError, match="was not made by this program"):
            make(tmp_path / "theirs", force=True)
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "years"


def test_what_appears_meanwhile_is_not_replaced(tmp_path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="exists"), reserved(target, force=False), atomic_folder(target) as folder:
        (folder / "file").write_text("new")
        target.mkdir()
        (target / "thesis.tex").write_text("years")
    assert names(tmp_path) == ["out"] and names(target) == ["thesis.tex"]


@pytest.mark.parametrize("spelling", ["parent/model", "parent", "parent/../parent", "link", "parent/model/"])
def test_an_input_or_what_holds_one_is_no_output(spelling, tmp_path) -> None:
    model = tmp_path / "parent" / "model"
    make(model)
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(UsageError, match="(is|holds) the input"), reserved(tmp_path / spelling, True, [model]):
        pass
    assert names(model) == ["file", MANIFEST]


def test_outputs_that_cannot_be(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("new/deep", "empty"):
        check_output(tmp_path / name, force=False)
    for name, message in [
        ("file", "is a file"),
        ("file/below", "cannot be written"),
        ("link", "is a link"),
        ("x" * 300, "File name too long"),
        ("é" * 121, "more than 240 bytes"),
        ("new/" + "y" * 300, "File name too long"),
        ("empty/..", "has no name of its own|exists"),
    ]:
        with pytest.raises(UsageError, match=message), reserved(tmp_path / name, force=True):
            pass
    assert names(tmp_path) == ["empty", "file", "link"]
    monkeypatch.chdir(tmp_path / "empty")
    for folder in (".", "..", "../empty"):
        with pytest.raises(UsageError, match="is the current folder"):
            check_output(Path(folder), force=True)
    with pytest.raises(UsageError, match="/proc/new' cannot be .* in '/proc'"):
        check_output(Path("/proc/new"), force=False)
    with pytest.raises(UsageError, match="is not a Unicode name"):
        check_output(Path("out-\udcff"), force=False)
    with pytest.raises(UsageError, match="is not a Unicode name"):
        check_workable(Path("out-\udcff"), "run")


HOLD = """
import sys, time
from pathlib import Path
from gblm_compress.storage.outputs import atomic_folder, reserved, working_in
target = Path(sys.argv[1])
def hold():
    print("held", flush=True)
    time.sleep(60)
"""


def holder(code: str, target: Path) -> subprocess.Popen[str]:
    """Another process that runs `code`, which calls `hold` once it holds the folder `target`."""
    command = [sys.executable, "-c", HOLD + code, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("way", ["reserved(target, False)", "working_in(target, 'run')"])
def test_a_second_process_stops_at_once_and_a_dead_one_holds_nothing(way, tmp_path) -> None:
    target = tmp_path / "out"
    first = holder(f"with {way}: hold()", target)
    for _ in range(2):
        with pytest.raises(UsageError, match="another process is writing to '.*/out'; wait"):
            make(target)
    kill(first)
    if target.exists():  # what it claimed
        shutil.rmtree(target)
    make(target)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("at", "code"),
    [
        ("filling", "(folder / 'file').write_text('new'); hold()"),
        ("replacing", "original = Path.rename; Path.rename = lambda self, to: (original(self, to), hold())"),
    ],
)
def test_what_a_killed_process_left_goes_and_its_predecessor_comes_back(at, code, tmp_path) -> None:
    target = tmp_path / "out"
    make(target, "old")
    kill(holder(f"with reserved(target, True), atomic_folder(target, force=True) as folder:\n    {code}", target))
    assert len(names(tmp_path)) == 3 and target.exists() == (at == "filling")
    with pytest.raises(UsageError, match="exists"):
        make(target)
    assert names(tmp_path) == ["out"] and (target / "file").read_text() == "old"


def test_nothing_of_others_beside_an_output_is_touched(tmp_path) -> None:
    """Neither what looks like a leftover, nor the work in progress of an output with a similar name."""
    long = tmp_path / ("b" * 200 + "1")
    others = [tmp_path / ".out.partial-notes", tmp_path / ".out.replaced", tmp_path / ".out.pruning"]
    for folder in others:
        folder.mkdir()
        (folder / "thesis.tex").write_text("years")
    with reserved(long, force=False), atomic_folder(long) as live:
        (live / "file").write_text("in progress")
        for name in ("b" * 200 + "2", "out"):
            make(tmp_path / name)
            make(tmp_path / name, force=True)
        assert (live / "file").read_text() == "in progress"
    assert all(names(folder) == ["thesis.tex"] for folder in others)


def test_one_folder_has_one_lock_whatever_links_lead_to_it(tmp_path) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with working_in(tmp_path / "real" / "run", "run"):
        with pytest.raises(UsageError, match="another process is writing"):
            make(tmp_path / "link" / "run")
        with pytest.raises(UsageError, match="is a link"), working_in(tmp_path / "link", "run"):
            pass


def test_a_folder_to_work_in(tmp_path, monkeypatch) -> None:
    run = tmp_path / "runs" / "a"
    check_workable(run, "run")
    assert not names(tmp_path)  # a look creates nothing
    with working_in(run, "run"):
        (run / "result").touch()
    with working_in(run, "run"), pytest.raises(UsageError, match="not the folder of a comparison"):
        check_workable(run, "comparison")
    with working_in(tmp_path / "nothing" / "came", "run"):
        pass
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_workable(folder, "run")
    assert names(tmp_path) == ["file", "runs"] and names(tmp_path / "runs") == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    monkeypatch.chdir(tmp_path / "mine")
    new = "not the folder of a run; give a folder that is new or empty"
    for folder, message in ((".", new), ("..", new), ("/", "root of the file system")):
        with pytest.raises(UsageError, match=message), working_in(Path(folder), "run"):
            pass
    assert names(tmp_path / "mine") == ["thesis.tex"]


HEADER = outputs.SUMMARY.header
DOCUMENTS = {
    "own.md": f"{HEADER}# of the last run\n",
    "step_summary_1": "",  # $GITHUB_STEP_SUMMARY
    "notes.md": f"# How I call gblm-compress\n{HEADER}",
    "kept.png": "",
}


@pytest.fixture
def documents(tmp_path) -> Path:
    """A folder of them, with a link to our own."""
    for name, content in DOCUMENTS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "link.md").symlink_to(tmp_path / "own.md")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["own.md", "new.md", "step_summary_1"])
def test_a_document_is_replaced_if_it_begins_as_its_kind_does(name, documents) -> None:
    path = documents / name
    with outputs.SUMMARY.reserved(path) as write:
        with pytest.raises(UsageError, match="give another name"), outputs.SUMMARY.reserved(path):
            pytest.fail("two write one file")
        write("now")
    assert path.read_text() == "now"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (outputs.SUMMARY, "notes.md", "notes.md' exists and was not written by this program"),
        (outputs.SUMMARY, "link.md", "is a link or not a file"),
        (outputs.SUMMARY, "x" * 300, "more than 240 bytes"),
        (outputs.SUMMARY, f"{'x' * 300}/new.md", "cannot be written: File name too long"),
        (outputs.HEAT_MAP, "thesis.doc", "heat map .* give a name that ends in .png"),
        (outputs.HEAT_MAP, "kept.png", "exists; give another file, or --force"),
        (outputs.HEAT_MAP, "folder.png", "is a link or not a file"),
        (outputs.HEAT_MAP, "nowhere/map.png", "there is no folder"),
        (outputs.HEAT_MAP, "kept.png/map.png", "there is no folder"),
    ],
)
def test_what_stands_in_the_way_of_a_document(kind, name, message, documents) -> None:
    with pytest.raises(UsageError, match=message), kind.reserved(documents / name):
        pytest.fail("the work began")


def test_a_document_may_lie_in_the_new_folder_that_a_run_works_in(tmp_path) -> None:
    with outputs.SUMMARY.reserved(tmp_path / "summary.md") as write, working_in(tmp_path, "run"):
        write("of the run")
    assert names(tmp_path) == [MANIFEST, "summary.md"]


@pytest.mark.parametrize("kind", [outputs.SUMMARY, outputs.HEAT_MAP])
def test_a_file_that_appears_while_a_document_is_made_is_kept(kind, tmp_path) -> None:
    path = tmp_path / f"mine{kind.suffix}"
    with pytest.raises(OutputError, match="exists"), kind.reserved(path) as write:
        path.write_text("mine")
        write("ours")
    assert path.read_text() == "mine" and names(tmp_path) == [path.name]
