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

import pytest
import torch

from gblm_compress.calibration.calls import Call
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import ModelError, OutputError, UsageError, VerificationError
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import grids, manifest
from gblm_compress.models.tiny import tiny_model
from gblm_compress.progress import Progress
from gblm_compress.pruning import saving
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


def test_what_is_finished_is_not_done_again(tiny, tmp_path, prose, monkeypatch) -> None:
    """After an end during the saving no gradient is measured and no block pruned a second time."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(grids, "verify", killed)
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    calls = count()
    original = Call.run
    monkeypatch.setattr(Call, "run", lambda *args: (next(calls), original(*args))[1])
    monkeypatch.setattr("gblm_compress.pruning.walk.prune_block_", None)
    run(tiny("llama"), tmp_path / "out", prose, resume=True, **GBLM)
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


def test_a_run_of_another_kind_is_not_resumed(tiny, tmp_path, prose, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saving, "save", killed)
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    with pytest.raises(UsageError, match=r"interrupted run with other settings, calibration.*leave out --resume"):
        run(tiny("llama"), tmp_path / "out", prose, resume=True, samples=2, method="wanda")
    run(tiny("llama"), tmp_path / "out", prose, method="wanda")
    assert manifest.read(tmp_path / "out")["prune"]["method"] == "wanda"


@pytest.mark.parametrize("settings", [GBLM, FITTED], ids=["gblm", "distilled"])
def test_a_flipped_bit_is_found_and_its_work_done_again(settings, tiny, tmp_path, prose, monkeypatch, capsys) -> None:
    run(tiny("llama"), tmp_path / "whole", prose, **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saving, "save", killed)
        run(tiny("llama"), tmp_path / "out", prose, **settings)
    folder, (name, *_) = tmp_path / ".out.pruning", ["distilled-1", "block-1"][settings is GBLM :]
    path = folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    run(tiny("llama"), tmp_path / "out", prose, resume=True, progress=Progress(), **settings)
    assert f"{path.name} of the interrupted run is damaged; its work is done again" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


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
def test_a_damaged_record_of_a_run_is_refused_or_started_anew(damage, ended, tiny, tmp_path, prose) -> None:
    record = shutil.copytree(ended, tmp_path / ended.name) / "run.json"
    record.unlink() if damage is None else record.write_text(damage)
    with pytest.raises(UsageError, match=r"run\.json' is missing or damaged.*leave out --resume"):
        run(tiny("llama"), tmp_path / "out", prose, resume=True, method="magnitude")
    run(tiny("llama"), tmp_path / "out", prose, resume=None, method="magnitude")
    assert {path.name for path in tmp_path.iterdir()} == {"out", prose.name}


def test_what_lies_in_the_place_of_finished_blocks_is_not_deleted(tiny, tmp_path, prose) -> None:
    (tmp_path / ".out.pruning").mkdir()
    (tmp_path / ".out.pruning" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        run(tiny("llama"), tmp_path / "out", prose, method="magnitude")
    assert content(tmp_path / ".out.pruning") == {"thesis.tex": b"years"}


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, prose, monkeypatch, capsys) -> None:
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), tmp_path / "out", prose, progress=Progress(), method="magnitude")
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
def test_a_full_disk_is_an_error_that_can_be_resumed_from(at, tiny, tmp_path, prose, monkeypatch) -> None:
    before = content(tiny("llama").folder)
    kept = "No space left on device.*finished blocks are kept: make room and give the same command with --resume"
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=kept):
        patch.setattr(records, "to_disk", full_at(at))
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    assert not (tmp_path / "out").exists() and content(tiny("llama").folder) == before
    run(tiny("llama"), tmp_path / "out", prose, resume=True, **GBLM)
    run(tiny("llama"), tmp_path / "whole", prose, **GBLM)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_appears_in_the_place_of_the_output_costs_no_finished_block(tiny, tmp_path, prose, monkeypatch) -> None:
    def occupy(written: object) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").write_text("mine")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="exists.*finished blocks are kept"):
        patch.setattr(grids, "verify", occupy)
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    (tmp_path / "out").rename(tmp_path / "notes")
    run(tiny("llama"), tmp_path / "out", prose, resume=True, **GBLM)
    assert (tmp_path / "notes" / "notes").read_text() == "mine" and manifest.read(tmp_path / "out")


def test_too_little_room_is_told_before_work_starts(tiny, tmp_path, prose, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(Call, "run", None)
    with pytest.raises(UsageError, match=r"1\.0 kB free; .* may be needed"):
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    assert [path.name for path in tmp_path.iterdir()] == [prose.name]


def test_too_little_room_to_resume_leaves_what_is_finished(tiny, tmp_path, prose, monkeypatch) -> None:
    """And what is finished counts as room that is not needed any more."""
    with monkeypatch.context() as patch, pytest.raises(OutputError):
        patch.setattr(records, "to_disk", full_at("model.safetensors"))
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    usage, folder = shutil.disk_usage(tmp_path), tmp_path / ".out.pruning"
    finished = content(folder)
    whole = tiny("llama").bytes_on_disk
    assert sum(map(len, finished.values())) > whole / 2
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="kB free.*finished blocks are kept"):
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=whole // 2))
        run(tiny("llama"), tmp_path / "out", prose, resume=True, **GBLM)
    assert content(folder) == finished
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * whole))
    run(tiny("llama"), tmp_path / "out", prose, resume=True, **GBLM)
    assert not folder.exists()


def test_a_fault_of_the_model_leaves_nothing_behind(tiny, tmp_path, prose, monkeypatch) -> None:
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "broken")
    broken.save_pretrained(folder)
    source = type(tiny("llama"))("broken", folder)
    with pytest.raises(ModelError, match="up_proj: 1 of"):
        run(source, tmp_path / "out", prose, offload=True, **GBLM)

    def wrong(written: object) -> None:
        raise VerificationError("wrong")

    monkeypatch.setattr(grids, "verify", wrong)
    with pytest.raises(VerificationError):
        run(tiny("llama"), tmp_path / "out", prose, **GBLM)
    assert {path.name for path in tmp_path.iterdir()} == {"broken", prose.name}


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), None, MemoryError()], ids=repr)
def test_finished_blocks_are_kept_where_the_fault_may_pass(cause, tiny, tmp_path, prose, monkeypatch, capsys) -> None:
    whole = run(tiny("llama"), tmp_path / "whole", prose, offload=True, **GBLM)

    def failing(self, index: int, *others: object) -> None:
        finish(self, index, *others)
        if index == 0:
            if isinstance(cause, MemoryError):
                raise cause
            raise ModelError("the file cannot be read") from cause

    finish = RunFolder.finish
    monkeypatch.setattr(RunFolder, "finish", failing)
    with pytest.raises((ModelError, MemoryError)):
        run(tiny("llama"), tmp_path / "out", prose, offload=True, progress=Progress(), **GBLM)
    kept = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    assert bool(kept) == (cause is not None) == ("--resume goes on from there" in capsys.readouterr().err)
    monkeypatch.setattr(RunFolder, "finish", finish)
    again = run(tiny("llama"), tmp_path / "out", prose, offload=True, resume=cause is not None, **GBLM)
    assert again.layers.keys() == whole.layers.keys()
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_distillation_of_a_model_on_disk_is_refused_with_its_reason(tiny, tmp_path, prose) -> None:
    with pytest.raises(UsageError, match="distillation works on the whole model.*--memory"):
        run(tiny("llama"), tmp_path / "out", prose, offload=True, **FITTED)


def test_a_rank_that_lags_behind_goes_by_what_was_there_at_the_start(tmp_path) -> None:
    """Else it would take what the first rank has just written for finished, and not be where the first waits."""
    barrier, folder, budgets = threading.Barrier(2), tmp_path / "run", {"a": Budget(Pattern("2:4"), 0.5)}
    finished = {"a": torch.ones(1, 2)}, {}, {"a": LayerResult("2:4", (1, 2), 2, False)}

    class Threads(Ranks):
        def wait(self) -> None:
            barrier.wait(timeout=20)

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
