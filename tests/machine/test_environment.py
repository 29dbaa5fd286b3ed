"""How busy a machine is: read off the system, and told where it spoils figures."""

import os
import subprocess
import sys

import pytest

from gblm_compress.cli import summaries
from gblm_compress.machine import environment


def test_a_core_that_works_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        found = max(environment.busy_cores(0.3) for _ in range(5))
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
    monkeypatch.setattr(environment, "busy_cores", lambda seconds: busy)
    monkeypatch.setattr(sys, "modules", {"torch": None} if loaded else {})
    environment.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(("busy", "lines"), [(0.1, []), (1.34, ["warning: 1.3 of 2 cores were busy with other work"])])
def test_a_benchmark_beside_other_work_says_so(busy: float, lines: list[str]) -> None:
    machine = {"cpu": "a CPU", "threads": 2, "device": "cpu", "cores": 2, "busy_cores": busy}
    said = summaries.benchmark({"measurements": [], "environment": machine})[1:]
    assert said[0] == "a CPU, 2 threads, device cpu"
    assert [line.partition(":")[0] + ":" + line.partition(":")[2].partition(":")[0] for line in said[1:]] == lines
