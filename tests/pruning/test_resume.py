"""Interrupted runs: killed anywhere and resumed, they end with the bytes of a run that nobody disturbed."""

import errno
import os
import re
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch

from gblm_compress import __version__
from gblm_compress.calibration.calls import Call
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import ModelError, OutputError, UsageError
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import grids, manifest
from gblm_compress.progress import Progress
from gblm_compress.pruning import saving
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.storage import records
from gblm_compress.storage.outputs import beside
from gblm_compress.training import checkpoints
from tests.conftest import Killed, flip_a_bit

GBLM = {"pattern": "2:4"}
FITTED = {"method": "wanda", "fit": "best", "quantise": "int8"}


@pytest.fixture
def fails(pruning, monkeypatch):
    """fails(module, "name", raises, Killed, **settings): such a run ends with that error while the name is another."""

    def run_to_its_end(where, attribute, instead, error=Killed, match=None, **given) -> None:
        with monkeypatch.context() as patch, pytest.raises(error, match=match):
            patch.setattr(where, attribute, instead)
            pruning(**given)

    return run_to_its_end


def killed(*args: object) -> None:
    raise Killed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("where", "name"), [(Call, "run"), (records, "rename_durably")])
@pytest.mark.parametrize(
    "settings",
    [
        GBLM,
        GBLM | {"quantise": "int4", "offload": True},
        {"allocation": "sensitivity", "offload": True},
        {"method": "magnitude"},
        FITTED,
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_ended_anywhere_it_resumes_to_the_same_bytes(where, name, settings, pruning, tmp_path, monkeypatch) -> None:
    """Ended before every file that becomes durable, and before some runs of a block on a sample."""
    pruning("whole", **settings)
    expected, output, original = content(tmp_path / "whole"), tmp_path / "out", getattr(where, name)
    for stop in range(1, 200, 1 if where is records else 11):
        calls = count(1)

        def ends(*args, calls=calls, stop=stop, **kwargs):
            if next(calls) == stop:
                raise Killed
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, ends)
            try:
                pruning(**settings)
            except Killed:
                assert not output.exists()
            else:
                assert stop > 1 or settings == {"method": "magnitude"}
                return
        pruning(resume=True, **settings)
        assert content(output) == expected
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", "prose.txt"}
        shutil.rmtree(output)
    pytest.fail("the run never came to its end")


def test_what_is_finished_is_not_done_again(pruning, fails, tmp_path, monkeypatch) -> None:
    """After an end during the saving no gradient is measured and no block pruned a second time."""
    fails(grids, "verify", killed, **GBLM)
    (tmp_path / ".out.pruning" / beside(tmp_path / "out", "partial-0")).mkdir()  # as SIGKILL leaves it
    calls, original = count(), Call.run
    monkeypatch.setattr(Call, "run", lambda *args: (next(calls), original(*args))[1])
    monkeypatch.setattr("gblm_compress.pruning.walk.prune_block_", None)
    pruning(resume=True, **GBLM)
    assert next(calls) == 0 and not (tmp_path / ".out.pruning").exists()


def test_a_run_of_another_kind_version_or_threads_is_not_resumed(pruning, fails, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    fails(saving, "save", killed, method="wanda")
    fails(saving, "save", killed, **GBLM)  # without --resume the earlier work is removed
    with pytest.raises(UsageError, match=r"interrupted run that differs in settings, calibration.*leave out --resume"):
        pruning(resume=True, samples=2, method="wanda")
    with monkeypatch.context() as patch:  # here the same command would not help, and is not asked for
        patch.setattr(checkpoints, "__version__", "9.0")
        held = rf"of version {re.escape(__version__)} \(this is 9\.0\); leave out --resume to start"
        with pytest.raises(UsageError, match=held):
            pruning(resume=True, **GBLM)
    # Other threads would add up in another order: some of the blocks would have other bits.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(UsageError, match=r"differs in threads; .*, with OMP_NUM_THREADS=3 \(torch uses 2 now\)"):
        pruning(resume=True, **GBLM)
    pruning(resume=None, progress=Progress(), **GBLM)
    assert "interrupted run that differs in threads; the run starts over" in capsys.readouterr().err.replace("\n", " ")
    assert manifest.read(tmp_path / "out")["compute"]["threads"] == 2


@pytest.mark.parametrize("settings", [GBLM, FITTED], ids=["gblm", "distilled"])
def test_a_changed_file_is_found_and_its_work_done_again(settings, pruning, fails, tmp_path, capsys) -> None:
    pruning("whole", **settings)
    fails(saving, "save", killed, **settings)
    name = "block-1.safetensors" if settings is GBLM else "distilled-1.safetensors"
    flip_a_bit(tmp_path / ".out.pruning" / name)
    pruning(resume=True, progress=Progress(), **settings)
    assert f"{name} of the interrupted run is damaged; its work is done again" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["", "states", "run.json", "block-0.safetensors"])
def test_unfinished_work_is_no_link(name, pruning, fails, tmp_path) -> None:
    """What a link leads to is another's: it could be written to, and would stay when the work is done."""
    fails(saving, "save", killed, **GBLM)
    path = tmp_path / ".out.pruning" / name
    there = path.rename(tmp_path / "elsewhere")
    path.symlink_to(there)
    for resume in (True, None, False):
        with pytest.raises(UsageError, match="move it away"):
            pruning(resume=resume, **GBLM)
    assert there.exists() and not (tmp_path / "out").exists()


def test_a_file_that_was_being_written_when_the_machine_stopped_is_removed(pruning, fails, tmp_path) -> None:
    """safetensors writes to `.tmp` and six characters first."""
    pruning("whole", **GBLM)
    fails(saving, "save", killed, **GBLM)
    begun = tmp_path / ".out.pruning" / ".tmpd4FX8j"
    begun.write_bytes(bytes(8))
    fails(saving, "save", killed, resume=True, **GBLM)
    assert not begun.exists()
    pruning(resume=True, **GBLM)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# The first is sound by itself, but nothing that was written.
DAMAGE = ['{"identity": {}, "budgets": null, "distilled": true}', "", "null", "[", "{}", '{"identity": 5}', None]
DAMAGE.append('{"identity": {}, "budgets": {"a": {"pattern": {"name": "2:x"}, "sparsity": 0.5}}}')


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_of_a_run_is_refused_or_started_anew(damage, pruning, fails, tmp_path, prose) -> None:
    fails(saving, "save", killed, method="magnitude")
    record = tmp_path / ".out.pruning" / "run.json"
    record.unlink() if damage is None else record.write_text(damage)
    with pytest.raises(UsageError, match=r"run\.json' is missing or damaged.*leave out --resume"):
        pruning(resume=True, method="magnitude")
    pruning(resume=None, method="magnitude")
    assert {path.name for path in tmp_path.iterdir()} == {"out", prose.name}


def test_what_lies_in_the_place_of_finished_blocks_is_not_deleted(pruning, tmp_path) -> None:
    (tmp_path / ".out.pruning").mkdir()
    (tmp_path / ".out.pruning" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        pruning(method="magnitude")
    assert content(tmp_path / ".out.pruning") == {"thesis.tex": b"years"}


def test_a_full_disk_keeps_what_is_finished(pruning, fails, tiny, tmp_path, prose, monkeypatch) -> None:
    usage, folder, whole = shutil.disk_usage(tmp_path), tmp_path / ".out.pruning", tiny("llama").bytes_on_disk

    def free(size: int):
        return lambda path: usage._replace(free=size)

    def full(file, to_disk=records.to_disk) -> None:
        if "model.safetensors" in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        to_disk(file)

    with monkeypatch.context() as patch:
        patch.setattr(Call, "run", None)
        fails(shutil, "disk_usage", free(1000), UsageError, r"1\.0 kB free; .* may be needed", **GBLM)
    assert [path.name for path in tmp_path.iterdir()] == [prose.name]
    kept = "No space left on device.*finished blocks are kept: make room and run the same command with --resume"
    fails(records, "to_disk", full, OutputError, kept, **GBLM)
    finished = content(folder)
    assert sum(map(len, finished.values())) > whole / 2
    message = "kB free.*finished blocks are kept"
    fails(shutil, "disk_usage", free(whole // 2), OutputError, message, resume=True, **GBLM)
    assert content(folder) == finished
    monkeypatch.setattr(shutil, "disk_usage", free(3 * whole))
    pruning(resume=True, **GBLM)
    assert not folder.exists()


AWAY = ModelError("a share that is away for a while")
AWAY.__cause__ = OSError(5, "Input/output error")


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), MemoryError(), AWAY, ModelError("it comes again")], ids=repr)
def test_finished_blocks_are_kept_where_the_fault_may_pass(fault, pruning, fails, tmp_path, capsys) -> None:
    def failing(self, index: int, *others: object) -> None:
        finish(self, index, *others)
        if index == 0:
            raise fault

    finish, passes = RunFolder.finish, "again" not in str(fault)
    fails(RunFolder, "finish", failing, type(fault), offload=True, progress=Progress(), **GBLM)
    assert (tmp_path / ".out.pruning").exists() == passes
    assert ("the same command with --resume continues from there" in capsys.readouterr().err) == passes
    pruning(offload=True, resume=passes, **GBLM)


def test_distillation_of_a_model_on_disk_is_refused_with_its_reason(pruning) -> None:
    with pytest.raises(UsageError, match="distillation works on the whole model.*--memory"):
        pruning(offload=True, **FITTED)


def test_a_rank_that_lags_behind_goes_by_what_was_there_at_the_start(tmp_path, monkeypatch) -> None:
    """Else it would take what the first rank has just written for finished, and not be where the first waits."""
    for meeting in ("wait", "check_same"):  # of two processes, in a test that is both
        monkeypatch.setattr(Ranks, meeting, lambda *given: None)
    finished = {"a": torch.ones(1, 2)}, {}, {"a": LayerResult("2:4", (1, 2), 2, False)}
    ahead, behind = (RunFolder(tmp_path / "run", {}, False, Ranks(rank, 2)) for rank in (0, 1))
    ahead.record.budgets = {"a": Budget(Pattern("2:4"), 0.5)}
    ahead.finish(0, *finished)
    assert behind.record.budgets is None and not behind.has_finished(0)
    behind.finish(0, *finished)
    assert behind.has_finished(0) and behind.finished(0, "a").equal(finished[0]["a"])


def test_nothing_to_resume_is_said(pruning, capsys) -> None:
    pruning(resume=True, progress=Progress(), method="magnitude")
    assert "there is no interrupted run to resume; this run starts from the beginning" in capsys.readouterr().err
    pruning("other", progress=Progress(), method="magnitude")
    assert "to resume" not in capsys.readouterr().err
