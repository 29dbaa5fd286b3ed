"""What it takes to prune a large model on a small machine, measured on its first blocks, and to export one.

    python benchmarks/large.py llama-3.1-70b --work scratch --method wanda --fit fast --json large.json
    python benchmarks/large.py llama-3.1-8b --work scratch --fit none --cold --json large-bytes.json
    python benchmarks/large.py llama-3.1-8b --work scratch --exports bitmask-int8 --json large-exports.json

Makes models of the real shapes with one block and with two, of random bfloat16 weights. `plan` predicts both prunings,
then `prune` prunes both from disk. Every further block takes as long as the second one, so the time of the whole model
follows. With `--blocks 1` the second is left out, and every block counts as long as the whole run. Peak memory includes
the libraries. New rows are added to the file of `--json`.

With `--cold` the system forgets the files in `--work` every second while `prune` runs, as it would if they were much
larger than its memory. So everything that is read again is read from disk again, and counted.

With `--exports` a whole model is made and exported; half of its weights are zero. Then each export is loaded in a
process of its own and decodes a few tokens. The peaks count memory without pages of files, because the system drops
these when it needs room.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
from cpu_decode import load_and_decode
from ending import exit_after
from random_llama import PRESETS, write_random
from transformers import Qwen3Config, Qwen3MoeConfig

from gblm_compress.errors import GblmError
from gblm_compress.machine import environment

BLOCK = 512  # bytes, in which the kernel counts what a process reads from disk
_QWEN = {"num_attention_heads": 64, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False}
# The values are those of each model's config.json.
MODELS = {
    **{name: shape.config() for name, shape in PRESETS.items()},
    "qwen3-32b": Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_key_value_heads=8, **_QWEN
    ),
    "qwen3-235b-a22b": Qwen3MoeConfig(
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        **_QWEN,
    ),
}


def told(*words: str) -> dict[str, Any]:
    """The JSON document that a command of gblm-compress prints, and the most memory it had, `own_bytes`."""
    command = [sys.executable, "-m", "gblm_compress", *words, "--json"]
    with TemporaryFile() as said:  # a pipe would be full before the command ends
        run = subprocess.Popen(command, stdout=said)
        peak = watched(run.pid, lambda: run.poll() is None)
        if run.returncode:
            raise GblmError(f"{' '.join(words)} ended with exit code {run.returncode}")
        said.seek(0)
        return {**json.load(said), "own_peak_bytes": peak}


def watched(pid: int, runs: Callable[[], bool]) -> int:
    """The most `own_bytes` of a process while it `runs`."""
    process, peak = psutil.Process(pid), 0
    while runs():
        peak = max(peak, own_bytes(process))
        time.sleep(0.1)
    return peak


def own_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children that is not shared with files."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for each in (process, *process.children(recursive=True)):
            memory = each.memory_info()
            total += memory.rss - memory.shared
    return total


@contextmanager
def forgetting(folder: Path) -> Iterator[None]:
    """Every second let the system drop the folder's files from memory; pages at work and those not yet on disk stay."""
    done = threading.Event()

    def forget() -> None:
        while not done.wait(1):
            with suppress(FileNotFoundError):  # a folder or file was removed or renamed meanwhile
                for path in folder.rglob("*.safetensors"):
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measured(name: str, blocks: int, work: Path, options: list[str], cold: bool) -> dict[str, Any]:
    """Plan and prune a model of that shape with so many blocks. Its folder and the output are removed."""
    model, output = work / f"{name}-{blocks}", work / "pruned"
    config = deepcopy(MODELS[name])
    config.num_hidden_layers = blocks
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:blocks]
    size = write_random(model, config)
    try:
        planned = told("plan", str(model), *options)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with forgetting(work) if cold else nullcontext():
            pruned = told("prune", str(model), "-o", str(output), *options)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    finally:
        for folder in (model, output):
            shutil.rmtree(folder, ignore_errors=True)
    disk = {
        "read_bytes": BLOCK * (after.ru_inblock - before.ru_inblock),
        "written_bytes": BLOCK * (after.ru_oublock - before.ru_oublock),
    }
    return {
        **(disk if cold else {}),
        "blocks": blocks,
        "checkpoint_bytes": size,
        "seconds": pruned["seconds"],
        "planned_seconds": planned["seconds"],
        "peak_bytes": pruned["peak_memory_bytes"],
        "planned_bytes": planned["memory_bytes"],
        "planned_disk_bytes": planned["disk_bytes"],
    }


def exported(model: Path, work: Path, form: str) -> dict[str, Any]:
    """Export a model, load the export, and remove it; `form` is a value of `--format` with further options."""
    output = work / "exported"
    result = told("export", str(model), "-o", str(output), "--format", *form.split())
    try:
        made = {"export": form, "peak_bytes": result["own_peak_bytes"]}
        return made | {name: result[name] for name in ("seconds", "bytes", "checks")} | loaded(output)
    finally:
        shutil.rmtree(output)


def loaded(folder: Path) -> dict[str, Any]:
    """Seconds until an export is loaded, milliseconds of a token, and the memory of both, in a process of its own."""
    here, there = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=load_and_decode, args=(folder, there))
    process.start()
    there.close()
    peak = watched(process.pid or 0, process.is_alive)
    load_seconds, ms_per_token = here.recv()
    return {"load_seconds": load_seconds, "ms_per_token": ms_per_token, "loaded_peak_bytes": peak}


def all_exported(name: str, work: Path, forms: list[str]) -> list[dict[str, Any]]:
    """Make a model with zeros, export it in each form, and remove it."""
    model = work / name
    size = write_random(model, deepcopy(MODELS[name]), zeros=True)
    try:
        return [{"model": name, "checkpoint_bytes": size, **exported(model, work, form)} for form in forms]
    finally:
        shutil.rmtree(model)


def pruned_row(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one block and two, or one alone, and say what the whole model takes by that."""
    settings = {
        name: getattr(given, name) for name in ("method", "fit", "pattern", "samples", "sequence_length", "memory")
    }
    options = ["--calibration", "demo", "--dtype", "bfloat16"]
    for name, value in settings.items():
        options += [f"--{name.replace('_', '-')}", value]
    runs = [measured(given.preset, n, given.work, options, given.cold) for n in range(1, given.blocks + 1)]
    first, last = runs[0], runs[-1]
    a_block = last["seconds"] - first["seconds"] if len(runs) > 1 else first["seconds"]
    row = {"model": given.preset, **settings, **last}
    row |= {"seconds_a_block": a_block, "peak_bytes_of_one": first["peak_bytes"]}
    blocks = MODELS[given.preset].num_hidden_layers
    row |= {"hours_of_all": (first["seconds"] + a_block * (blocks - 1)) / 3600, "all_blocks": blocks}
    return row


def main() -> None:
    """Measure what is asked for; print it, and add it to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=MODELS)
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and outputs")
    parser.add_argument("--blocks", type=int, choices=(1, 2), default=2)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--fit", default="fast")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", default="16")
    parser.add_argument("--sequence-length", default="512")
    parser.add_argument("--memory", default="1GiB", help="so little that the model stays on disk")
    parser.add_argument("--cold", action="store_true", help="count what is read from disk and written to it")
    parser.add_argument("--exports", nargs="+", help="values of --format, each with its further options")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    new = all_exported(given.preset, given.work, given.exports) if given.exports else [pruned_row(given)]
    print(json.dumps(new, indent=2))
    if given.json:
        rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
        document = {"environment": environment(), "rows": [*rows, *new]}
        given.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    exit_after(main)
