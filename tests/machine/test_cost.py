"""Time and memory that are said before the work."""

from types import SimpleNamespace

import pytest

import gblm_compress
from gblm_compress.machine import cost
from tests.conftest import export

SHORT = {"sequence_length": 32, "quiet": False}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.5, "less than a second"), (50, "about 50 s"), (120, "about 2 min"), (7200, "about 2.0 h")]
)
def test_time_and_memory_are_one_sentence(seconds: float, said: str, monkeypatch) -> None:
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e9)))
    smaller = "; --few 1 take about 60 s" if seconds > 600 else ""
    line = f"this takes {said} and at most 3.0 GB of memory on this machine{smaller}"
    assert cost.sentence(seconds, 2e9, ("--few 1", 60.0)) == line


def test_every_long_command_says_its_cost(tiny, pruned, prose, tmp_path, monkeypatch, capsys) -> None:
    """Before a model is loaded."""
    monkeypatch.setattr(cost, "operations_per_second", lambda device, dtype: 1000.0)
    monkeypatch.setattr(cost, "bytes_per_second", lambda device: 1000.0)
    monkeypatch.setattr("gblm_compress.measure.benchmarking._benchmark_lane", lambda *arguments: [])
    dense, sparse = tiny("llama").folder, pruned().folder
    _, packed = export(pruned(), tmp_path / "packed", format="bitmask")

    def check_line() -> None:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("this takes about ")]
        assert " h and at most " in line and " GB of memory" in line

    gblm_compress.evaluate(packed.folder, baseline=dense, dataset=prose, **SHORT)
    check_line()
    gblm_compress.recover(sparse, tmp_path / "out", teacher=dense, data=[str(prose)], tokens=256, batch=2, **SHORT)
    check_line()
    gblm_compress.export(sparse, tmp_path / "again", format="bitmask")
    check_line()
    gblm_compress.benchmark(packed.folder, baseline=dense, quiet=False)
    check_line()
