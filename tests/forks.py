"""`python -m tests.forks` imports everything once and runs each command in a fork: own processes without the seconds
that importing takes. Requests and answers are lines of JSON. A command that takes too long is killed.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

LONG_ENOUGH = 120.0  # seconds, in which every command on a tiny model ends also where other tests run
PROGRAM = "from gblm_compress.cli.app import main\nmain()"
RANKS = """
import os, sys
from gblm_compress.cli import app
second = os.fork()
rank = "0" if second else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
os.environ["MASTER_PORT"] = sys.argv.pop(1)
exec(sys.argv.pop(1))
try:
    app.main()
finally:
    if second and os.waitpid(second, 0)[1]:
        sys.exit(1)
"""
"""The program as two ranks: a free port and what to change in each of them, then the arguments."""
MEMORY_LIMIT = 8 << 30  # bytes of address space that a command may take beyond what the server has


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is its exit code, `signal` what killed it."""

    code: int | None
    signal: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def timed_out(self) -> bool:
        return self.signal == signal.SIGKILL


class Server:
    """The server, as a context manager."""

    def __enter__(self) -> Self:
        # One thread each: a fork has only the thread that forked it, and a pool of the parent's would be missed.
        single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GBLM_COMPRESS_TRACEBACK": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | single | environment | {"COLUMNS": "120"},
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self, arguments: list[str], folder: Path, cache: Path, seconds: float = LONG_ENOUGH, code: str = PROGRAM
    ) -> Outcome:
        """Run `gblm-compress`, or other code, with these arguments in a folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": arguments, "folder": str(folder), "cache": str(cache), "seconds": seconds, "code": code}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    _import_what_commands_import()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), file=answers, flush=True)


def _import_what_commands_import() -> None:
    import onnxruntime  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from optimum.exporters.tasks import TasksManager  # noqa: F401

    from gblm_compress.exporters import onnx, sparse  # noqa: F401
    from gblm_compress.measure import inspection  # noqa: F401
    from gblm_compress.models import packed_checkpoint  # noqa: F401
    from gblm_compress.runs import comparison, pipeline  # noqa: F401


def _run(arguments: list[str], folder: str, cache: str, seconds: float, code: str) -> dict[str, Any]:
    streams = [Path(cache) / name for name in ("stdout", "stderr")]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        ended = 1
        try:
            for number, path in enumerate(streams, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.argv = ["gblm-compress", *arguments]
            os.chdir(folder)
            os.environ["GBLM_COMPRESS_CACHE"] = cache
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_LIMIT, -1))
            ended = _exit_code(code)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:
            print(f"Traceback of what main let through: {error!r}", file=sys.stderr, flush=True)
            ended = 1
        os._exit(ended)
    status = _wait(child, start + seconds)
    return {
        "code": os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "stdout": streams[0].read_text(errors="backslashreplace"),
        "stderr": streams[1].read_text(errors="backslashreplace"),
        "seconds": time.monotonic() - start,
    }


def _exit_code(code: str) -> int:
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _wait(child: int, deadline: float) -> int:
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.002)


if __name__ == "__main__":
    _serve()
