"""Commands in processes of their own, without the seconds that importing takes: they fork from a server that has
imported everything. A command that takes too long is killed.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from gblm_compress.exporters import onnx_fused
from gblm_compress.measure import benchmarking
from tests.scripts import ROOT

LONG_ENOUGH = 120.0  # seconds, in which every command on a tiny model ends also where other tests run
MEMORY_LIMIT = 8 << 30  # bytes of address space that a command may take beyond what the server has
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
BUILDER = "from gblm_compress.exporters.onnx_builder import main\nmain()"
IMPORTED = [
    __name__, "onnxruntime", "onnxruntime_genai.models.builder", "optimum.exporters.tasks", "pyarrow.parquet",
    "transformers.models.llama.modeling_llama",
    *(f"gblm_compress.{name}" for name in (
        "exporters.onnx", "exporters.sparse", "measure.inspection", "models.packed_checkpoint", "runs.comparison",
        "runs.pipeline",
    )),
]  # fmt: skip
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GBLM_COMPRESS_TRACEBACK": "1"}
# One thread each: a fork has only the thread that forked it, and a pool of the parent's would be missed.
ENVIRONMENT |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {"COLUMNS": "120"}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is its exit code, or minus the signal that killed it."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Server:
    """Forks of a server that ends with the process that started it; with the method "fork", of this process."""

    def __init__(self, method: str = "forkserver") -> None:
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(IMPORTED)
            with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}):
                forkserver.ensure_running()

    def run(
        self, arguments: list[str], folder: Path, cache: Path, seconds: float = LONG_ENOUGH, code: str = PROGRAM
    ) -> Outcome:
        cache.mkdir(exist_ok=True)
        streams = [cache / name for name in ("stdout", "stderr")]
        for stream in streams:  # a command may be killed before it opens them
            stream.write_bytes(b"")
        process = self._context.Process(target=_run, args=(arguments, folder, cache, code))
        start = time.monotonic()
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        took = time.monotonic() - start
        return Outcome(process.exitcode, *(stream.read_text(errors="backslashreplace") for stream in streams), took)

    def build(self, command: Sequence[str], **_: Any) -> "CompletedProcess[str]":
        """In place of `subprocess.run` for the builder of fused graphs, whose imports take longer than its work."""
        with tempfile.TemporaryDirectory() as cache:
            done = self.run([*command[3:]], Path.cwd(), Path(cache), code=BUILDER)
        return CompletedProcess(command, done.code, done.stdout, done.stderr)


class _Worker:
    """In place of `subprocess.Popen` for a model's process in a benchmark, in a process that the server has forked."""

    def __init__(self, _: Sequence[str], **__: Any) -> None:
        (asked, asks), (answers, answered) = os.pipe(), os.pipe()
        self.child = os.fork()
        if not self.child:
            os.dup2(asked, 0)
            os.dup2(answered, 1)
            sys.stdin = os.fdopen(0)
            benchmarking.main()
            os._exit(0)
        os.close(asked)
        os.close(answered)
        self.stdin, self.stdout = os.fdopen(asks, "w"), os.fdopen(answers)

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def communicate(self) -> None:
        self.wait()
        self.stdout.close()


def _run(arguments: list[str], folder: Path, cache: Path, code: str) -> NoReturn:
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(cache / name, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["gblm-compress", *arguments]
    os.chdir(folder)
    os.environ["GBLM_COMPRESS_CACHE"] = str(cache)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_LIMIT, -1))
    onnx_fused.subprocess = SimpleNamespace(run=Server("fork").build)
    benchmarking.subprocess = SimpleNamespace(Popen=_Worker, PIPE=None)
    try:
        exec(code, {"__name__": "__main__"})
        ended: object = 0
    except SystemExit as end:
        ended = end.code
    except BaseException as error:
        print(f"Traceback: the program raised {error!r}", file=sys.stderr)
        ended = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended if isinstance(ended, int) else ended is not None)
