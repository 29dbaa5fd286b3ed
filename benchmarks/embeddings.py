"""What a server of embeddings gains: requests a second and their times, exports of one encoder side by side.

    pip install fastapi uvicorn httpx
    python benchmarks/embeddings.py dense int8 packed --concurrency 1 8 32 --json result.json

Serves each folder by `docs/examples/embeddings.py`, one request on one thread, all folders at once, and asks them in
turn. A request is one text of 4 to 160 words of the prose that comes with the package. The first round is warm-up.
Figures are medians over rounds.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ending import exit_after
from rich.console import Console
from rich.table import Table
from serving import requests

from gblm_compress.machine import environment, version_of
from gblm_compress.models.files import GRAPH

EXAMPLES, START_SECONDS = Path(__file__).parents[1] / "docs" / "examples", 60


def served(folder: Path, stack: ExitStack) -> str:
    """Start a server that ends with `stack`; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "--log-level", "warning", "embeddings:app"]
    server = subprocess.Popen([*program, "--port", str(port)], env={**os.environ, "FOLDER": str(folder)})
    stack.callback(server.wait)
    stack.callback(server.terminate)
    for _ in range(10 * START_SECONDS):
        time.sleep(0.1)
        if server.poll() is not None:
            sys.exit(f"the server of {folder} ended; is the folder an ONNX export, and is uvicorn installed?")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://127.0.0.1:{port}/v1/embeddings"
    sys.exit(f"the server of {folder} did not start within {START_SECONDS} s")


async def load(url: str, texts: list[str], concurrency: int) -> tuple[float, list[float]]:
    """Seconds for all texts, so many at once, and of each request."""
    import httpx

    waiting, times = list(texts), []
    async with httpx.AsyncClient(timeout=START_SECONDS) as client:

        async def user() -> None:
            while waiting:
                start, text = time.perf_counter(), waiting.pop()
                (await client.post(url, json={"input": text})).raise_for_status()
                times.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(concurrency)))
        return time.perf_counter() - start, times


def main() -> None:
    """Serve, ask, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=300, help="Requests of a round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if missing := [str(folder) for folder in options.folders if not (folder / GRAPH).exists()]:
        parser.error(f"no {GRAPH} in {', '.join(missing)}; give folders of `gblm-compress export --format onnx`")
    texts, rows = [request.prompt for request in requests(options.requests)], []
    with ExitStack() as stack:
        urls = {folder.name: served(folder, stack) for folder in options.folders}
        for concurrency in options.concurrency:
            found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in urls}
            for number in range(options.rounds + 1):
                for name, url in urls.items():
                    result = asyncio.run(load(url, texts, concurrency))
                    if number:
                        found[name].append(result)
            for name, results in found.items():
                percentiles = [quantiles(times, n=100) for _, times in results]
                row: dict[str, Any] = {"folder": name, "concurrency": concurrency}
                row["requests/s"] = len(texts) / median(seconds for seconds, _ in results)
                row |= {f"p{p} ms": 1000 * median(one[p - 1] for one in percentiles) for p in (50, 99)}
                rows.append(row)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if options.json:
        versions = {name: version_of(name) for name in ("fastapi", "uvicorn", "onnxruntime")}
        content = {"environment": environment(), "versions": versions, "requests": options.requests, "rows": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    exit_after(main)
