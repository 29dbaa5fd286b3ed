"""Several processes: two gloo ranks on a CPU against one process, and what happens when one of them dies."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gblm_compress.calibration.generation import Author
from gblm_compress.calibration.ranks import Ranks, device_of_rank
from gblm_compress.errors import UsageError
from gblm_compress.methods import fits
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.progress import Progress
from gblm_compress.settings import CalibrationSettings
from gblm_compress.training.fits import How
from gblm_compress.training.trainer import Plan
from tests.conftest import saved
from tests.families.tiny import tiny_family

LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0",
}


def arguments(source, output: Path, prose: Path, *more: str) -> list[str]:
    return [
        "prune", str(source.folder), "-o", str(output), "--calibration", str(prose),
        "--samples", "5", "--sequence-length", "32", "--fit", "none", "--json", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "settings"),
    [
        ("torchrun", {"method": "gblm", "pattern": "2:4"}),
        ("accelerate", {"method": "regional", "pattern": "2:4"}),
        ("forks", {"method": "obs", "allocation": "sensitivity", "gradient_norm": "l2"}),
    ],
)
def test_two_ranks_agree_with_one_process(start, settings, pair, pruning, tiny, tmp_path, prose) -> None:
    options = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
    given = arguments(tiny("llama"), tmp_path / "two", prose, *options)
    if start in LAUNCHERS:
        command = [sys.executable, "-m", *LAUNCHERS[start].split(), "-m", "gblm_compress", *given]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    else:
        done = pair(*given)
    assert done.stdout.count('"folder"') == 1, done.stderr  # the first rank alone reports
    pruning("one", samples=5, **settings)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    differing = sum(int(((one[name] != 0) != (two[name] != 0)).sum()) for name in one)
    assert differing <= 1e-4 * sum(tensor.numel() for tensor in one.values())
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", prose.name}


def test_all_ranks_read_the_text_that_they_have_written_together(pair, tiny, tmp_path) -> None:
    given = arguments(tiny("llama"), tmp_path / "two", Path("self"), "--method", "wanda")
    say = "from gblm_compress.pruning import stage\nread = stage.fingerprint\n"
    say += "stage.fingerprint = lambda samples: (print(f'text {read(samples)}', flush=True), read(samples))[1]"
    done = pair(*given, change=say)
    assert '"folder"' in done.stdout, done.stderr
    first, second = (line for line in done.stdout.splitlines() if line.startswith("text "))
    assert first == second and first.removeprefix("text ") in (tmp_path / "two" / "gblm_manifest.json").read_text()
    source = tiny("llama")
    text = CalibrationSettings(dataset="self", samples=5, sequence_length=32)
    for rank, share in ((0, [True, True, False, False, False]), (1, [False, False, True, True, True])):
        alone = Ranks(rank, 2)
        alone.every, alone.sum_ = lambda *_: False, lambda tensors: None
        part = Author(source, "cpu", 1 << 30, alone, Progress(quiet=True)).calibration(byte_tokenizer(), text)
        assert [bool(sample["input_ids"].any()) for sample in part] == share


FAULTS = """
import ctypes, os, signal
from datetime import timedelta
from gblm_compress.calibration import ranks
from gblm_compress.errors import ModelError
from gblm_compress.pruning import walk

def dies(*args):
    os._exit(9)

def hangs(*args):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # once the other has ended
    os.kill(os.getpid(), signal.SIGSTOP)

def fails(*args):
    raise ModelError("a fault of this rank alone")

ranks.SILENCE = timedelta(seconds=3)
if rank == "{rank}":
    walk.prune_block_ = {fault}
"""
LOST = "error: rank 0 of 2: another process of the run ended or does not answer"
ALONE = "error: a fault of this rank alone"


@pytest.mark.parametrize(
    ("fault", "rank", "message"), [("dies", 1, LOST), ("hangs", 1, LOST), ("fails", 0, ALONE), ("fails", 1, ALONE)]
)
def test_what_ends_one_rank_ends_the_other_with_a_clear_error(
    fault, rank, message, pair, tiny, tmp_path, prose
) -> None:
    """Without torchrun's own watch over its workers: the survivor must find out itself."""
    given = arguments(tiny("llama"), tmp_path / "out", prose)
    done = pair(*given, change=FAULTS.format(fault=fault, rank=rank))
    assert done.code == 1 and message in done.stderr and "Traceback" not in done.stderr, done
    assert ("--resume" in done.stderr) or message is not LOST
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("version", "from gblm_compress.calibration import ranks; ranks.__version__ += rank"),
        ("model", "sys.argv[2] = sys.argv[2].replace('llama', 'mistral') if rank == '1' else sys.argv[2]"),
        ("settings", "sys.argv += ['--pattern', '2:4'] if rank == '1' else []"),
        ("calibration", "from gblm_compress.tasks import text; text.load_text = lambda *given: f'{rank}, ' * 9999"),
    ],
)
def test_processes_that_were_given_different_things_are_refused(what, change, pair, tiny, tmp_path, prose) -> None:
    assert tiny("mistral").folder.exists()
    done = pair(*arguments(tiny("llama"), tmp_path / "out", prose, "--method", "wanda"), change=change)
    assert done.code == 1 and f"error: the 2 processes of the run differ in {what}; give" in done.stderr, done
    assert {path.name for path in tmp_path.iterdir()} == {prose.name}


def test_the_first_rank_may_save_for_longer_than_others_wait(pair, tiny, tmp_path, prose) -> None:
    slow = "import time; from gblm_compress.calibration import ranks; from gblm_compress.pruning import saving\n"
    slow += "ranks.TIMEOUT = 3 * ranks.TIMEOUT / ranks.TIMEOUT.total_seconds(); save = saving.save\n"
    slow += "saving.save = lambda *given: (time.sleep(5), save(*given))[1]"
    done = pair(*arguments(tiny("llama"), tmp_path / "out", prose), change=slow)
    assert done.code == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out", prose.name}


def by_adam_alone(patch: pytest.MonkeyPatch) -> None:
    """Least squares ends a hundredth before the optimum, where the last bits of its sums decide."""
    for name in ("balanced", "best"):
        patch.setitem(fits.FITS, name, replace(fits.FITS[name], apply=fits.none, on_grid=None))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"pattern": "2:4", "fit": "balanced"}),
        ("llama", {"quantise": "int4", "group": 32, "fit": "best", "rounds": 2}),
        ("mixtral", {"fit": "balanced", "rounds": 2}),
    ],
    ids=["block", "model-on-a-grid-in-rounds", "experts-in-rounds"],
)
def test_two_ranks_fit_as_one_process_does_with_the_same_steps(
    family, settings, pair, pruning, tmp_path, prose, monkeypatch
) -> None:
    source = saved(tiny_family(family), tmp_path / family)
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    options += ["--method", "wanda", "--samples", "9", "--dtype", "float32"]
    change = "from tests.calibration.test_ranks import by_adam_alone, pytest\nby_adam_alone(pytest.MonkeyPatch())"
    done = pair(*arguments(source, tmp_path / "two", prose, *options), change=change)
    assert done.code == 0, done.stderr
    by_adam_alone(monkeypatch)
    plan = How.plan

    def of_two(self: How, samples: int, name: str, ranks: Ranks) -> Plan:
        return replace(plan(self, samples, name, Ranks(0, 2)), own=range(samples))

    monkeypatch.setattr(How, "plan", of_two)
    pruning("one", source, samples=9, method="wanda", dtype="float32", **settings)
    dense = load_file(source.folder / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        moved = (tensor - dense[name]).norm()
        assert (tensor - two[name]).norm() <= 1e-3 * moved, name


def test_every_process_has_a_part_in_each_step_and_none_is_held_out_by_one_alone() -> None:
    how = How(3, 0.02, "float32")
    plans = [how.plan(32, "fit", Ranks(rank, 4)) for rank in range(4)]
    assert [plan.own for plan in plans] == [range(0, 8), range(8, 16), range(16, 24), range(24, 32)]
    assert all((plan.steps, plan.held_out) == (plans[0].steps, [7, 15, 23, 31]) for plan in plans)
    assert all([index // 8 for index in step] == [0, 1, 2, 3] for step in plans[0].steps)
    assert sorted(index for step in plans[0].steps[:7] for index in step) == sorted({*range(32)} - {7, 15, 23, 31})
    assert {index for step in how.plan(3, "fit", Ranks(0, 3)).steps for index in step} == {0, 1}


def test_samples_and_rows_are_shared_without_loss_and_devices_follow_the_rank(monkeypatch) -> None:
    shares = [Ranks(rank, 3).share(list(range(10))) for rank in range(3)]
    assert sorted(sample for share in shares for sample in share) == list(range(10))
    with pytest.raises(UsageError, match="2 samples cannot be split over 3 processes"):
        Ranks(0, 3).share([1, 2])
    monkeypatch.setattr(Ranks, "sum_", lambda ranks, tensors: None)
    weight, scales = torch.rand(7, 4), torch.rand(7, 1)
    parts = [Ranks(rank, 3).by_rows(torch.mul, weight, scales) for rank in range(3)]
    assert [int(part.any(1).sum()) for part in parts] == [2, 2, 3] and torch.equal(sum(parts), weight * scales)
    assert device_of_rank("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert (device_of_rank("cuda"), device_of_rank("cuda:0"), device_of_rank("cpu")) == ("cuda:2", "cuda:0", "cpu")
