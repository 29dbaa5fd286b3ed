"""The load test of servers without vLLM: its requests, its figures, and servers that start, end and are killed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.scripts import loaded

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from subprocess import Popen


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


folder, *options = sys.argv[1:]
given = dict(zip(options[::2], options[1::2]))
if folder == "damaged":
    sys.exit("layout 'csr' is not known")
Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's workers
HTTPServer((given["--host"], int(given["--port"])), Healthy).serve_forever()
"""
PROGRAM = (sys.executable, "-c", SERVER)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the benchmark reads /proc of Linux")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("serving") as module:
        yield module


def test_a_server_is_killed_with_all_that_it_started(script: ModuleType, tmp_path: Path) -> None:
    with script.Server(Path("sound"), tmp_path / "log", program=PROGRAM) as server:
        processes = server.processes()
        assert len(processes) == 2 and server.start_seconds > 0
        assert server.peak() > 0 and server.memory() > 0
    assert not any(map(psutil.Process.is_running, processes))


def test_a_server_that_does_not_start_says_why(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the server of damaged ended; see .*log:\nlayout 'csr' is not known"):
        script.Server(Path("damaged"), tmp_path / "log", program=PROGRAM)


def test_figures(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds alternate who is first; the first round does not count; ratios are of rounds, not of sums."""
    asked: list[tuple[str, int]] = []
    seconds = {"dense": iter([9.0, 2.0, 4.0]), "sparse": iter([9.0, 1.0, 1.0])}

    async def load(server: str, requests: list[Any], concurrency: int) -> tuple[list[Any], float]:
        asked.append((server, len(requests)))
        counts = [request.tokens for request in requests]
        return [script.Answer((1,) * n, (), 0.1, 0.1 + 0.02 * (n - 1)) for n in counts], next(seconds[server])

    monkeypatch.setattr(script, "load", load)
    found = script.measure({"dense": "dense", "sparse": "sparse"}, count=5, concurrency=4, rounds=2)
    assert [server for server, _ in asked] == ["sparse", "dense", "dense", "sparse", "sparse", "dense"]
    assert found["ratio"] == pytest.approx({"median": 3.0, "lowest": 2.0, "highest": 4.0})
    assert found["sparse"]["ttft_ms"] == pytest.approx({"p50": 100, "p90": 100, "p99": 100})
    assert found["dense"]["tpot_ms"] == pytest.approx({"p50": 20, "p90": 20, "p99": 20})
    tokens = [sum(request.tokens for request in script.requests(5, seed)) for seed in (1, 2)]
    assert found["dense"]["tokens_per_second"] == pytest.approx([tokens[0] / 2, tokens[1] / 4])
    script.show({"servers": {name: {"memory": 1, "peak": 2, "folder": name} for name in script.NAMES}, "load": [found]})
