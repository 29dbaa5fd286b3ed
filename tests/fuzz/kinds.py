"""What is spoilt, and which commands read it. All inputs are made once, small, by the program itself."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
from gguf import GGUFWriter
from hypothesis import strategies as st

from gblm_compress.exporters import export
from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, ExportSettings, PruneSettings
from gblm_compress.tasks.text import demo_paragraphs
from tests.forks import PROGRAM, Server
from tests.fuzz.mutations import ODD_TEXTS, Draw, spoil

SHORT = ["--sequence-length", "16"]
EVALUATE = ["evaluate", "MODEL", "--dataset", "text.txt", *SHORT, "--max-windows", "2", "--json", "--quiet"]
PRUNE = ["prune", "MODEL", "-o", "out", "--calibration", "text.txt", "--samples", "2", *SHORT, "--json", "--quiet"]
RUN = ["run", "small.yaml", "-o", "ran", "--json", "--quiet"]
SMALL_RECIPE = """\
model: dense
prune:
  method: magnitude
  fit: none
evaluate:
  dataset: text.txt
  sequence_length: 16
  max_windows: 2
"""
RECIPE = """\
model: MODEL
calibration:
  dataset: text.txt
  samples: 2
  sequence_length: 16
prune:
  method: wanda
  pattern: "2:4"
  overrides:
    - layers: "*.0.*"
      pattern: dense
export:
  - format: bitmask
    dtype: auto
evaluate:
  dataset: text.txt
  sequence_length: 16
  max_windows: 2
benchmark:
  batch: [1, 2]
  prompt: 8
gates:
  max_perplexity_increase: 0.5
  min_decode_speedup: 1.1
"""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        made: the name of the folder in the store that the working folder is copied from.
        files: patterns of what is spoilt, below the working folder.
        commands: what reads it; MODEL is the name of the model's folder.
        changes: folders that the commands may write to although they exist.
    """

    made: str
    files: tuple[str, ...]
    commands: tuple[list[str], ...]
    changes: tuple[str, ...] = ()


def _with(arguments: list[str], model: str, *more: str) -> list[str]:
    return [model if argument == "MODEL" else argument for argument in arguments] + list(more)


def _models() -> dict[str, Kind]:
    dense, pruned = "dense", "pruned"
    kinds = {
        "dense folder": Kind(
            dense,
            ("dense/*",),
            (
                _with(PRUNE, dense, "--method", "magnitude"),
                _with(PRUNE, dense, "--method", "wanda", "--offload"),
                ["inspect", dense, "--json", "--quiet"],
                ["validate", "recipe.yaml"],
            ),
        ),
        "sharded folder": Kind("sharded", ("sharded/*",), (_with(PRUNE, "sharded", "--method", "magnitude"),)),
        "pruned folder": Kind(
            pruned,
            ("pruned/*",),
            (
                ["export", pruned, "-o", "out", "--format", "bitmask", "--json", "--quiet"],
                ["export", pruned, "-o", "out", "--format", "semi-structured", "--json", "--quiet"],
                _with(EVALUATE, pruned),
                _with(PRUNE, pruned, "--method", "magnitude"),
            ),
        ),
        "run folder": Kind("run", (".out.pruning/*",), (_with(PRUNE, dense, "--resume"),), (".out.pruning",)),
    }
    for name in ("bitmask", "semi-structured", "bitmask-int8", "semi-structured-int4", "onnx", "onnx-kernels"):
        kinds[f"{name} folder"] = Kind(name, (f"{name}/*",), (_with(EVALUATE, name),))
    return kinds


KINDS: dict[str, Kind] = {
    **_models(),
    "records of a recipe": Kind(
        "ran", ("ran/.stages/*", "ran/pruned/*", "ran/gblm_manifest.json"), (RUN,), changes=("ran",)
    ),
    "gguf": Kind("gguf", ("tiny.gguf",), (["inspect", "tiny.gguf", "--json", "--quiet"],)),
    "recipe": Kind("dense", ("recipe.yaml",), (["validate", "recipe.yaml"], ["run", "recipe.yaml", "--dry-run"])),
    "text": Kind(
        "dense",
        ("text.txt", "text.jsonl"),
        (
            _with(PRUNE, "dense", "--method", "wanda"),
            ["evaluate", "dense", "--dataset", "text.jsonl", *SHORT, "--max-windows", "2", "--json", "--quiet"],
        ),
    ),
    "measurements": Kind("cache", ("cache/measurements.json",), (_with(EVALUATE, "bitmask"),), ("cache",)),
    "command line": Kind("dense", (), (_with(PRUNE, "dense"), _with(EVALUATE, "dense"), ["inspect", "dense"])),
}
ODD_ARGUMENTS = [
    "", "-1", "0", "1e400", "nan", "9" * 400, ".", "..", "/", "~nobody", "dense", "./dense", "text.txt", "/dev/zero",
    "2:4", "4:2", "0:0", "a" * 300, "\x1b[2J", "[/red]", "{}", "*", "é", "--", "-o", "--json", "--force", "gguf.gguf",
    *ODD_TEXTS[3:5],
]  # fmt: skip


def build_store(store: Path, server: Server) -> None:
    """Make every kind's unspoilt folder below `store`."""
    silence_libraries()
    progress, text = Progress(quiet=True), "\n\n".join(demo_paragraphs("evaluation")[:40])[:3000]
    jsonl = "".join(json.dumps({"text": paragraph}) + "\n" for paragraph in text.split("\n\n"))
    model = store / "dense" / "dense"
    model.parent.mkdir(parents=True)
    build_tiny("llama", model)

    def beside(name: str, make: Callable[[Path], object]) -> Path:
        folder = store / name
        folder.mkdir(exist_ok=True)
        make(folder / name)
        (folder / "text.txt").write_text(text)
        (folder / "text.jsonl").write_text(jsonl)
        (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", "dense"))
        (folder / "small.yaml").write_text(SMALL_RECIPE)
        return folder / name

    def shard(folder: Path) -> None:
        load_model(source).save_pretrained(folder, max_shard_size="100KB")
        load_processor(source).save_pretrained(folder)

    source = ModelSource("dense", model)
    beside("dense", lambda folder: None)
    beside("sharded", shard)
    settings = PruneSettings(method="magnitude", pattern="2:4", fit="none", quantise="int8")
    pruned = ModelSource(
        "pruned",
        beside("pruned", lambda folder: prune(source, folder, settings, CalibrationSettings(), progress=progress)),
    )
    exports = {
        "bitmask": ExportSettings(format="bitmask"),
        "semi-structured": ExportSettings(format="semi-structured"),
        "bitmask-int8": ExportSettings(format="bitmask-int8"),
        "semi-structured-int4": ExportSettings(format="semi-structured-int4"),
        "onnx": ExportSettings(format="onnx"),
        "onnx-kernels": ExportSettings(format="onnx", kernels=True),
    }
    for name, wanted in exports.items():
        beside(name, lambda folder, wanted=wanted: export(pruned, folder, wanted, progress=progress))
    shutil.copytree(store / "dense", store / "ran")
    (store / "first-cache").mkdir()
    _do(server, RUN, store / "ran", store / "first-cache")
    beside("gguf", lambda folder: _write_gguf(folder.with_name("tiny.gguf")))
    shutil.copytree(store / "bitmask", store / "cache")
    shutil.copytree(store / "dense", store / "run")
    _do(server, _with(PRUNE, "dense"), store / "run", store / "first-cache", INTERRUPTED)
    (store / "run" / ".out.lock").unlink()
    assert (store / "run" / ".out.pruning" / "run.json").exists()
    (store / "cache" / "cache").mkdir()
    _do(server, _with(EVALUATE, "bitmask"), store / "cache", store / "cache" / "cache")


def _do(server: Server, arguments: list[str], folder: Path, cache: Path, code: str = PROGRAM) -> None:
    outcome = server.run(arguments, folder, cache, code=code)
    assert outcome.code == 0, outcome.stderr


def _write_gguf(path: Path) -> None:
    """A small file of that format: no model that could be loaded, but every part of a header that is read."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", numpy.ones((2, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# What a run has finished when it is killed before its last step.
INTERRUPTED = """
import os
from gblm_compress.cli import app
from gblm_compress.pruning import saving
saving.save = lambda *arguments: os._exit(0)
app.main()
"""


def example(kind: Kind, folder: Path, draw: Draw) -> tuple[list[str], list[str]]:
    """Spoil a copy of the kind's folder; what was done, and the arguments to run."""
    command = list(draw(st.sampled_from(kind.commands)))
    if not kind.files:
        return [], _odd_arguments(command, draw)
    files = sorted(path for pattern in kind.files for path in folder.glob(pattern) if path.is_file())
    done = []
    for path in draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        done.append(spoil(path, draw))
    return done, command


def _odd_arguments(command: list[str], draw: Draw) -> list[str]:
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(command) - 1))
        what = draw(st.sampled_from(["replace", "insert", "delete", "repeat"]))
        if what == "delete":
            del command[place]
        elif what == "repeat":
            command.insert(place, command[place])
        else:
            command[place : place + (what == "replace")] = [draw(st.sampled_from(ODD_ARGUMENTS) | st.text(max_size=8))]
        if not command:
            return ["--version"]
    return [argument.replace("\x00", "") for argument in command]
