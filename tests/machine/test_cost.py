"""Time and memory that are said before the work."""

from types import SimpleNamespace

import pytest

import gblm_compress
from gblm_compress.machine import cost
from tests.conftest import export

SHORT = {"sequence_length": 32, "quiet": False}


def test_a_long_run_is_offered_a_smaller_one(monkeypatch) -> None:
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e9)))
    needs = "and at most 3.0 GB of memory on this machine"
    for seconds, time in ((0.5, "less than a second"), (50, "about 50 s"), (120, "about 2 min")):
        assert cost.sentence(seconds, 2e9, "--few 1", 20.0) == f"this takes {time} {needs}"
    assert cost.sentence(7200, 2e9, "--few 1", 60.0) == f"this takes about 2.0 h {needs}; --few 1 take about 60 s"


@pytest.mark.parametrize(("amount", "seconds", "fewer"), [(100, 3000, 10), (500_000, 30_000, 5000), (3, 90_000, 1)])
def test_the_smaller_amount_is_round_and_takes_five_minutes(amount: int, seconds: float, fewer: int) -> None:
    assert cost.fewer(amount, seconds) == fewer


def test_every_long_command_says_its_cost(tiny, pruned, prose, tmp_path, monkeypatch, capsys) -> None:
    """Before a model is loaded; on a machine that is slow enough, with a smaller choice."""
    monkeypatch.setattr(cost, "operations_per_second", lambda device, dtype: 1000.0)
    monkeypatch.setattr(cost, "bytes_per_second", lambda device: 1000.0)
    monkeypatch.setattr("gblm_compress.measure.benchmarking._benchmark_lane", lambda *arguments: [])
    dense, sparse = tiny("llama").folder, pruned().folder
    _, packed = export(pruned(), tmp_path / "packed", format="bitmask")

    def said() -> str:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("this takes about ")]
        assert " h and at most " in line and " GB of memory" in line
        return line

    gblm_compress.evaluate(packed.folder, baseline=dense, dataset=prose, **SHORT)
    assert "; --max-windows " in said()
    gblm_compress.recover(sparse, tmp_path / "out", teacher=dense, data=[str(prose)], tokens=256, batch=2, **SHORT)
    assert "; --tokens " in said()
    gblm_compress.export(sparse, tmp_path / "again", format="bitmask")
    said()
    gblm_compress.benchmark(packed.folder, baseline=dense, quiet=False)
    assert "; " not in said()
