"""What is spoilt, and which commands read it. All inputs are made once, small, by the program itself."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import PruneSettings
from gblm_compress.tasks.text import demo_paragraphs
from tests.conftest import build_tiny, export, prune
from tests.forks import PROGRAM, Server
from tests.fuzz.mutations import ODD_TEXTS, Draw, extreme, spoil
from tests.tasks.families import table

SHORT = "--sequence-length 16"
EVALUATE = f"evaluate MODEL --dataset text.txt {SHORT} --max-windows 2 --json --quiet"
EXPORT = "export pruned -o out --json --quiet --format"
INSPECT = "inspect MODEL --json --quiet"
PRUNE = f"prune MODEL -o out --calibration text.txt --samples 2 {SHORT} --json --quiet"
MAGNITUDE, WANDA = f"{PRUNE} --method magnitude", f"{PRUNE} --method wanda"
FITTED = (
    *(f"{PRUNE} --fit {fit}" for fit in ("none --quantise int8", "none --quantise int4", "fast", "obs")),
    f"{MAGNITUDE} --quantise int4",
)
PRUNED = (f"{EXPORT} bitmask", f"{EXPORT} semi-structured", EVALUATE, MAGNITUDE)
RECOVER = (
    f"recover pruned -o out --teacher dense --data text.txt {SHORT} --tokens 64 --batch 2 --rate 0.001 --json --quiet"
)
REPORT = "report ran -o page.html --json"
RUN = "run small.yaml -o ran --json --quiet"
RUN_DOCUMENTED = f"{RUN} --junit gates.xml --summary summary.md"
SMALL_RECIPE = """\
model: dense
prune: {method: magnitude, fit: none}
evaluate: {dataset: text.txt, sequence_length: 16, max_windows: 2}
"""
RECIPE = """\
model: dense
calibration: {dataset: text.txt, samples: 2, sequence_length: 16}
prune:
  method: wanda
  pattern: "2:4"
  overrides:
    - layers: "*.0.*"
      pattern: dense
export:
  - {format: bitmask, dtype: auto}
evaluate: {dataset: text.txt, sequence_length: 16, max_windows: 2}
benchmark: {batch: [1, 2], prompt: 8}
gates: {max_perplexity_increase: 0.5, min_decode_speedup: 1.1}
"""
EXPORTS = {
    **{name: {"format": name} for name in ("bitmask", "semi-structured", "bitmask-int8", "bitmask-int4", "onnx")},
    "onnx-kernels": {"format": "onnx", "kernels": True},
}


@dataclass(frozen=True)
class Kind:
    made: str  # the folder in the store that the working folder is copied from
    files: tuple[str, ...]  # patterns of what is spoilt, below the working folder
    commands: tuple[str, ...]  # what reads it
    changes: tuple[str, ...] = ()  # folders and files that the commands may write to although they exist
    model: str = "dense"  # the MODEL of the commands
    spoil: Callable[[Path, Draw], str] = spoil


def words(command: str, model: str) -> list[str]:
    return command.replace("MODEL", model).split()


_DOCUMENTS = ("page.html", "gates.xml", "summary.md")
_RECORDS = ("ran/.stages/*", "ran/pruned/*", "ran/gblm_manifest.json")
KINDS: dict[str, Kind] = {
    "dense folder": Kind("dense", ("dense/*",), (MAGNITUDE, f"{WANDA} --memory 1MB", INSPECT, "validate recipe.yaml")),
    "sharded folder": Kind("sharded", ("sharded/*",), (MAGNITUDE,), model="sharded"),
    "pruned folder": Kind("pruned", ("pruned/*",), PRUNED, model="pruned"),
    "run folder": Kind("run", (".out.pruning/*",), (f"{PRUNE} --resume",), (".out.pruning",)),
    **{f"{name} folder": Kind(name, (f"{name}/*",), (EVALUATE,), model=name) for name in EXPORTS},
    "records of a recipe": Kind("ran", _RECORDS, (RUN,), changes=("ran",)),
    "recipe": Kind("dense", ("recipe.yaml",), ("validate recipe.yaml",)),
    "text": Kind("dense", ("text.txt", "text.jsonl"), (WANDA, EVALUATE.replace("text.txt", "text.jsonl"))),
    "parquet": Kind(
        "dense", ("text.parquet",), tuple(line.replace("text.txt", "text.parquet") for line in (EVALUATE, PRUNE))
    ),
    "tokenizer": Kind("dense", ("dense/tokenizer.json",), (EVALUATE, WANDA)),
    "extreme weights": Kind("dense", ("dense/model.safetensors",), (*FITTED, EVALUATE, INSPECT), spoil=extreme),
    "extreme pruned weights": Kind(
        "pruned", ("pruned/model.safetensors",), (*PRUNED, f"{EXPORT} bitmask-int8", INSPECT), (), "pruned", extreme
    ),
    "checkpoints": Kind("training", (".out.recovery/*",), (f"{RECOVER} --resume",), (".out.recovery",)),
    "documents": Kind("ran", (*_DOCUMENTS, "ran/report.json"), (REPORT, RUN_DOCUMENTED), (*_DOCUMENTS, "ran")),
    "push": Kind("ran", ("ran/report.json", "ran/pruned/*"), ("push ran pruned --json",)),
    "measurements": Kind("cache", ("cache/measurements.json",), (EVALUATE,), ("cache",), "bitmask"),
    "command line": Kind("dense", (), (PRUNE, EVALUATE, "inspect dense")),
}
ODD_ARGUMENTS = [
    "", "-1", "0", "1e400", "nan", "9" * 400, ".", "..", "/", "~nobody", "dense", "./dense", "text.txt", "/dev/zero",
    "2:4", "4:2", "0:0", "a" * 300, "\x1b[2J", "[/red]", "{}", "*", "é", "--", "-o", "--json", "--force",
    *ODD_TEXTS[3:5],
]  # fmt: skip


# What a run has finished when it is killed before its last step.
INTERRUPTED = """
import os
from gblm_compress.cli import app
from gblm_compress.pruning import saving
from gblm_compress.training import recovery
stop = lambda *arguments: os._exit(0)
"""


def build_store(store: Path, server: Server) -> None:
    """Make every kind's unspoilt folder below `store`."""
    silence_libraries()
    text = "\n\n".join(demo_paragraphs("evaluation")[:40])[:3000]
    beside = {
        "text.txt": text,
        "text.jsonl": "".join(json.dumps({"text": paragraph}) + "\n" for paragraph in text.split("\n\n")),
        "recipe.yaml": RECIPE,
        "small.yaml": SMALL_RECIPE,
    }

    def place(name: str) -> Path:
        (store / name).mkdir(parents=True)
        for file, content in beside.items():
            (store / name / file).write_text(content)
        (store / name / "text.parquet").write_bytes(table(text=text.split("\n\n")))
        return store / name / name

    source, pruned = (ModelSource(name, place(name)) for name in ("dense", "pruned"))
    build_tiny("llama", source.folder)
    shutil.copytree(source.folder, pruned.folder.with_name("dense"))
    sharded = place("sharded")
    load_model(source).save_pretrained(sharded, max_shard_size="100KB")
    load_processor(source).save_pretrained(sharded)
    prune(source, pruned.folder, PruneSettings(method="magnitude", pattern="2:4", fit="none", quantise="int8"))
    for name, settings in EXPORTS.items():
        export(pruned, place(name), **settings)
    for name, made, command, code in (
        ("ran", "dense", RUN_DOCUMENTED, PROGRAM),
        ("ran", "ran", REPORT, PROGRAM),
        ("run", "dense", PRUNE, INTERRUPTED + "saving.save = stop\napp.main()"),
        ("training", "pruned", RECOVER, INTERRUPTED + "recovery.Recovery._save = stop\napp.main()"),
        ("cache", "bitmask", EVALUATE, PROGRAM),
    ):
        if name != made:
            shutil.copytree(store / made, store / name)
        cache = store / "cache" / "cache" if name == "cache" else store / "first-cache"
        outcome = server.run(words(command, made), store / name, cache, code=code)
        assert outcome.code == 0, outcome.stderr
    for name, work in (("run", ".out.pruning"), ("training", ".out.recovery")):
        (store / name / ".out.lock").unlink()
        assert (store / name / work / "run.json").exists()


def example(kind: Kind, folder: Path, draw: Draw) -> tuple[list[str], list[str]]:
    """Spoil a copy of the kind's folder; what was done, and the arguments to run."""
    command = words(draw(st.sampled_from(kind.commands)), kind.model)
    if not kind.files:
        return [], _odd_arguments(command, draw)
    files = sorted(path for pattern in kind.files for path in folder.glob(pattern) if path.is_file())
    chosen = draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True))
    return [kind.spoil(path, draw) for path in chosen], command


def _odd_arguments(command: list[str], draw: Draw) -> list[str]:
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(command)))
        new = draw(st.sampled_from([*ODD_ARGUMENTS, *command]) | st.text(max_size=8))
        command[place : place + draw(st.integers(0, 1))] = draw(st.sampled_from([[], [new]]))
    return [argument.replace("\x00", "") for argument in command]
