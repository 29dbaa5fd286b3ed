"""Interrupted runs: killed anywhere and resumed, they end with the bytes of a run that nobody disturbed."""

import errno
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from gblm_compress import __version__
from gblm_compress.calibration.calls import Call
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import ModelError, OutputError, UsageError, VerificationError
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import grids, manifest
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import tiny_model
from gblm_compress.progress import Progress
from gblm_compress.pruning import saving, stage
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.storage import records
from tests.conftest import prune

GBLM = {"pattern": "2:4"}
FITTED = {"method": "wanda", "fit": "best", "quantise": "int8"}


class Killed(BaseException):
    """Ends a run here and now; nothing in the program catches it."""


def run(source, output: Path, prose: Path, *, resume=False, offload=False, samples=3, progress=None, **settings):
    return prune(
        source, output, PruneSettings(**({"fit": "none"} | settings)),
        CalibrationSettings(dataset=str(prose), samples=samples, sequence_length=32),
        resources=ResourceSettings(offload=offload), resume=resume, progress=progress or Progress(quiet=True),
    )  # fmt: skip


@pytest.fixture
def go(tiny, tmp_path, prose):
    """go("out", **settings): the tiny Llama, pruned to that folder of the test's own."""
    return lambda name="out", source=None, **given: run(source or tiny("llama"), tmp_path / name, prose, **given)


@pytest.fixture
def fails(go, monkeypatch):
    """fails(module, "name", raises, Killed, **settings): such a run ends with that error while the name is another."""

    def run_to_its_end(where, attribute, instead, error=Killed, match=None, **given) -> None:
        with monkeypatch.context() as patch, pytest.raises(error, match=match):
            patch.setattr(where, attribute, instead)
            go(**given)

    return run_to_its_end


def killed(*args: object) -> None:
    raise Killed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("where", "name"), [(Call, "run"), (records, "rename_durably")])
@pytest.mark.parametrize(
    ("settings", "offload"),
    [
        (GBLM, False),
        (GBLM | {"quantise": "int4"}, True),
        ({"allocation": "sensitivity"}, True),
        ({"method": "magnitude"}, False),
        (FITTED, False),
    ],
    ids=["gblm", "gblm-int4-offload", "sensitivity-offload", "magnitude", "best-int8"],
)
def test_ended_anywhere_and_resumed_it_gives_the_same_bytes(
    where, name, settings, offload, tiny, tmp_path, prose, monkeypatch
) -> None:
    """Ended before every file that becomes durable, and before some runs of a block on a sample."""
    run(tiny("llama"), tmp_path / "whole", prose, offload=offload, **settings)
    expected, output, original = content(tmp_path / "whole"), tmp_path / "out", getattr(where, name)
    step = 1 if where is records else 11
    for stop in range(1, 200, step):
        calls = count(1)

        def ends(*args, calls=calls, stop=stop, **kwargs):
            if next(calls) == stop:
                raise Killed
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, ends)
            try:
                run(tiny("llama"), output, prose, offload=offload, **settings)
            except Killed:
                assert not output.exists()
            else:
                assert stop > 1 or settings == {"method": "magnitude"}
                return
        run(tiny("llama"), output, prose, resume=True, offload=offload, **settings)
        assert content(output) == expected
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", prose.name}
        shutil.rmtree(output)
    pytest.fail("the run never came to its end")


def test_what_is_finished_is_not_done_again(go, fails, monkeypatch) -> None:
    """After an end during the saving no gradient is measured and no block pruned a second time."""
    fails(grids, "verify", killed, **GBLM)
    calls, original = count(), Call.run
    monkeypatch.setattr(Call, "run", lambda *args: (next(calls), original(*args))[1])
    monkeypatch.setattr("gblm_compress.pruning.walk.prune_block_", None)
    go(resume=True, **GBLM)
    assert next(calls) == 0


CHAIN = """
import os, signal
from gblm_compress.storage import records
from gblm_compress.cli import app
original, left = records.rename_durably, [3]
def kills(source, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)
records.rename_durably = kills
app.main()
"""


def test_a_process_killed_again_and_again_comes_to_its_end(server, tiny, tmp_path, tmp_path_factory, prose) -> None:
    """Each process is killed with SIGKILL when the third file of its own is about to become durable."""
    run(tiny("gpt2"), tmp_path / "whole", prose, **GBLM)
    arguments = [
        "prune", str(tiny("gpt2").folder), "-o", str(tmp_path / "out"), "--pattern", "2:4", "--fit", "none",
        "--calibration", str(prose),
        "--samples", "3", "--sequence-length", "32", "--json", "--quiet",
    ]  # fmt: skip
    kills, cache = 0, tmp_path_factory.mktemp("cache")
    for _ in range(12):
        done = server.run([*arguments, "--resume"], tmp_path, cache, code=CHAIN)
        if done.code == 0:
            break
        assert done.signal == signal.SIGKILL, done.stderr
        kills += 1
    assert kills >= 3 and done.code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", prose.name}


def test_a_run_of_another_kind_is_not_resumed(go, fails, tmp_path) -> None:
    fails(saving, "save", killed, **GBLM)
    with pytest.raises(UsageError, match=r"interrupted run with other settings, calibration.*leave out --resume"):
        go(resume=True, samples=2, method="wanda")
    go(method="wanda")
    assert manifest.read(tmp_path / "out")["prune"]["method"] == "wanda"


def test_a_run_of_another_version_is_not_resumed(go, fails, tmp_path, monkeypatch, capsys) -> None:
    """The same command would not help; so the message does not ask for it."""
    with monkeypatch.context() as patch:
        patch.setattr(stage, "__version__", "0.0.9")
        fails(saving, "save", killed, **GBLM)
    with pytest.raises(UsageError, match=rf"of version 0\.0\.9 \(this is {__version__}\); leave out --resume to start"):
        go(resume=True, **GBLM)
    go(resume=None, progress=Progress(), **GBLM)
    assert "it is started anew" in capsys.readouterr().err


def test_another_number_of_threads_is_not_resumed(go, fails, tmp_path, monkeypatch, capsys) -> None:
    """It would add up in another order: some of the blocks would have other bits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    fails(saving, "save", killed, **GBLM)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with pytest.raises(UsageError, match=r"other threads; .*, with OMP_NUM_THREADS=3 \(torch uses 2 now\)"):
        go(resume=True, **GBLM)
    monkeypatch.setenv("MKL_NUM_THREADS", "2")  # it outweighs the other
    with pytest.raises(UsageError, match="with OMP_NUM_THREADS and MKL_NUM_THREADS=3"):
        go(resume=True, **GBLM)
    go(resume=None, progress=Progress(), **GBLM)
    assert "interrupted run with other threads; it is started anew" in capsys.readouterr().err.replace("\n", " ")
    assert manifest.read(tmp_path / "out")["compute"]["threads"] == 2


@pytest.mark.parametrize("settings", [GBLM, FITTED], ids=["gblm", "distilled"])
@pytest.mark.parametrize("how", ["a flipped bit", "of another run"])
def test_a_file_that_was_not_written_is_found_and_its_work_done_again(
    how, settings, go, fails, tmp_path, capsys
) -> None:
    go("whole", **settings)
    fails(saving, "save", killed, **settings)
    fails(saving, "save", killed, name="other", samples=2, **settings)
    name = "block-1.safetensors" if settings is GBLM else "distilled-1.safetensors"
    path, other = (tmp_path / folder / name for folder in (".out.pruning", ".other.pruning"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data if how == "a flipped bit" else other.read_bytes())
    go(resume=True, progress=Progress(), **settings)
    assert f"{name} of the interrupted run is damaged; its work is done again" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["", "states", "run.json", "block-0.safetensors"])
def test_unfinished_work_is_no_link(name, go, fails, tmp_path) -> None:
    """What a link leads to is another's: it could be written to, and would stay when the work is done."""
    fails(saving, "save", killed, **GBLM)
    path = tmp_path / ".out.pruning" / name
    there = path.rename(tmp_path / "elsewhere")
    path.symlink_to(there)
    for resume in (True, None, False):
        with pytest.raises(UsageError, match="move it away"):
            go(resume=resume, **GBLM)
    assert there.exists() and not (tmp_path / "out").exists()


# The first is sound by itself, but nothing that was written.
DAMAGE = ['{"identity": {}, "budgets": null, "distilled": true}', "", "null", "[", "{}", '{"identity": 5}', None]
DAMAGE.append('{"identity": {}, "budgets": {"a": {"pattern": {"name": "2:x"}, "sparsity": 0.5}}}')


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory) -> Path:
    """What a run by magnitude that ended before it saved leaves beside its output."""
    output = tmp_path_factory.mktemp("ended") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saving, "save", killed)
        run(tiny("llama"), output, Path("demo"), method="magnitude")
    return output.with_name(".out.pruning")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_of_a_run_is_refused_or_started_anew(damage, ended, go, tmp_path, prose) -> None:
    record = shutil.copytree(ended, tmp_path / ended.name) / "run.json"
    record.unlink() if damage is None else record.write_text(damage)
    with pytest.raises(UsageError, match=r"run\.json' is missing or damaged.*leave out --resume"):
        go(resume=True, method="magnitude")
    go(resume=None, method="magnitude")
    assert {path.name for path in tmp_path.iterdir()} == {"out", prose.name}


def test_what_lies_in_the_place_of_finished_blocks_is_not_deleted(go, tmp_path) -> None:
    (tmp_path / ".out.pruning").mkdir()
    (tmp_path / ".out.pruning" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        go(method="magnitude")
    assert content(tmp_path / ".out.pruning") == {"thesis.tex": b"years"}


def test_ctrl_c_says_how_to_go_on(fails, tmp_path, capsys) -> None:
    fails(saving, "save", Mock(side_effect=KeyboardInterrupt), KeyboardInterrupt, progress=Progress(), method="wanda")
    assert "the same command with --resume goes on from there" in capsys.readouterr().err
    assert (tmp_path / ".out.pruning" / "block-1.safetensors").exists()


def full_at(name: str):
    """`to_disk` on a disk that is full when a file of that name is written."""
    original = records.to_disk

    def full(file) -> None:
        if name in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    return full


@pytest.mark.parametrize("at", ["block-1", "model.safetensors"])
def test_a_full_disk_is_an_error_that_can_be_resumed_from(at, go, fails, tiny, tmp_path) -> None:
    before = content(tiny("llama").folder)
    kept = "No space left on device.*finished blocks are kept: make room and give the same command with --resume"
    fails(records, "to_disk", full_at(at), OutputError, kept, **GBLM)
    assert not (tmp_path / "out").exists() and content(tiny("llama").folder) == before
    go(resume=True, **GBLM)
    go("whole", **GBLM)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_appears_in_the_place_of_the_output_costs_no_finished_block(go, fails, tmp_path) -> None:
    def occupy(written: object) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").write_text("mine")

    fails(grids, "verify", occupy, OutputError, "exists.*finished blocks are kept", **GBLM)
    (tmp_path / "out").rename(tmp_path / "notes")
    go(resume=True, **GBLM)
    assert (tmp_path / "notes" / "notes").read_text() == "mine" and manifest.read(tmp_path / "out")


def test_too_little_room_is_told_before_work_starts_and_leaves_what_is_finished(
    go, fails, tiny, tmp_path, prose, monkeypatch
) -> None:
    """What is finished counts as room that is not needed any more."""
    usage, folder, whole = shutil.disk_usage(tmp_path), tmp_path / ".out.pruning", tiny("llama").bytes_on_disk

    def free(size: int):
        return lambda path: usage._replace(free=size)

    with monkeypatch.context() as patch:
        patch.setattr(Call, "run", None)
        fails(shutil, "disk_usage", free(1000), UsageError, r"1\.0 kB free; .* may be needed", **GBLM)
    assert [path.name for path in tmp_path.iterdir()] == [prose.name]
    fails(records, "to_disk", full_at("model.safetensors"), OutputError, **GBLM)
    finished = content(folder)
    assert sum(map(len, finished.values())) > whole / 2
    message = "kB free.*finished blocks are kept"
    fails(shutil, "disk_usage", free(whole // 2), OutputError, message, resume=True, **GBLM)
    assert content(folder) == finished
    monkeypatch.setattr(shutil, "disk_usage", free(3 * whole))
    go(resume=True, **GBLM)
    assert not folder.exists()


def test_a_fault_of_the_model_leaves_nothing_behind(go, fails, tiny, tmp_path, prose) -> None:
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "broken")
    broken.save_pretrained(folder)
    with pytest.raises(ModelError, match="1 of 8,192 values of .*up_proj"):
        go(source=ModelSource("broken", folder), offload=True, **GBLM)
    fails(grids, "verify", Mock(side_effect=VerificationError("wrong")), VerificationError, **GBLM)
    assert {path.name for path in tmp_path.iterdir()} == {"broken", prose.name}


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), None, MemoryError()], ids=repr)
def test_finished_blocks_are_kept_where_the_fault_may_pass(cause, go, fails, tmp_path, capsys) -> None:
    go("whole", offload=True, **GBLM)

    def failing(self, index: int, *others: object) -> None:
        finish(self, index, *others)
        if index == 0:
            if isinstance(cause, MemoryError):
                raise cause
            raise ModelError("the file cannot be read") from cause

    finish = RunFolder.finish
    errors = (ModelError, MemoryError)
    fails(RunFolder, "finish", failing, errors, offload=True, progress=Progress(), **GBLM)
    kept = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    assert bool(kept) == (cause is not None) == ("--resume goes on from there" in capsys.readouterr().err)
    go(offload=True, resume=cause is not None, **GBLM)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_distillation_of_a_model_on_disk_is_refused_with_its_reason(go) -> None:
    with pytest.raises(UsageError, match="distillation works on the whole model.*--memory"):
        go(offload=True, **FITTED)


def test_a_rank_that_lags_behind_goes_by_what_was_there_at_the_start(tmp_path) -> None:
    """Else it would take what the first rank has just written for finished, and not be where the first waits."""
    barrier, folder, budgets = threading.Barrier(2), tmp_path / "run", {"a": Budget(Pattern("2:4"), 0.5)}
    finished = {"a": torch.ones(1, 2)}, {}, {"a": LayerResult("2:4", (1, 2), 2, False)}

    class Threads(Ranks):
        def wait(self) -> None:
            barrier.wait(timeout=20)

        def check_same(self, given: dict[str, object]) -> None:
            """There is no process group to ask."""

    def until(there) -> None:
        deadline = time.monotonic() + 20
        while not there():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def first() -> None:
        run = RunFolder(folder, {}, False, Threads(0, 2))
        run.decide(budgets)
        run.finish(0, *finished)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(first)
        run = RunFolder(folder, {}, False, Threads(1, 2))
        until(lambda: '"2:4"' in (folder / "run.json").read_text())
        assert run.record.budgets is None
        run.decide(budgets)
        until(lambda: (folder / "block-0.safetensors").exists())
        assert not run.has_finished(0)
        run.finish(0, *finished)
        ahead.result(timeout=20)
    assert run.record.budgets == budgets and run.has_finished(0) and list(run.finished(0)) == ["a"]


def test_nothing_to_resume_is_said(go, capsys) -> None:
    go(resume=True, progress=Progress(), method="magnitude")
    assert "there is no interrupted run to resume; this one starts anew" in capsys.readouterr().err
    go("other", progress=Progress(), method="magnitude")
    assert "to resume" not in capsys.readouterr().err
