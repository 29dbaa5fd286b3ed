"""The Python API: its names are pinned, its documentation runs, and it gives what the commands give."""

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from rich.table import Table
from rich.text import Text
from transformers import BertConfig, BertModel

import gblm_compress
from gblm_compress import api
from gblm_compress.calibration import ranks
from gblm_compress.cli import summaries
from gblm_compress.command import text_file
from gblm_compress.errors import DataError, OutputError, UsageError
from gblm_compress.machine import memory
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.runs import advice
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.storage.records import as_json
from gblm_compress.tasks.text import load_text
from tests.runs.reports import write_artefact, write_report
from tests.scripts import ROOT, blocks

DOCS = ROOT / "docs"
TEXT = {"samples": 3, "sequence_length": 32}


def test_the_public_names() -> None:
    assert gblm_compress.__all__ == [
        "GblmError", "__version__", "advise", "benchmark", "compare", "evaluate", "export", "inspect", "load",
        "onnxruntime_library", "plan", "prune", "push", "recover", "report", "run",
    ]  # fmt: skip
    assert all(getattr(gblm_compress, name).__doc__ for name in gblm_compress.__all__)


@pytest.mark.parametrize("own", [True, False])
def test_only_the_command_line_changes_the_environment(own, monkeypatch) -> None:
    called = []
    monkeypatch.setattr(api, "share_cores", lambda: called.append(own))
    monkeypatch.setattr(memory, "is_own_process", own)
    api.validate("ci-smoke", quiet=True)
    assert called == [True] * own


def test_the_signature_shows_every_setting() -> None:
    shown = inspect.signature(gblm_compress.prune).parameters
    fields = (*PruneSettings.model_fields, *CalibrationSettings.model_fields, *ResourceSettings.model_fields)
    assert {*fields} - {*shown} == {"dataset"}
    assert shown["samples"].default == 128 and "settings" not in shown
    assert "\n    samples: Number of windows" in gblm_compress.prune.__doc__
    assert inspect.signature(gblm_compress.export).parameters["format"].default is inspect.Parameter.empty


def test_the_page_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python", page=DOCS / "python.md"):
        exec(compile(block, "docs/python.md", "exec"), {})
    assert (tmp_path / "out" / "run" / "report.json").is_file()
    assert "<title>tiny: " in (tmp_path / "out" / "page.html").read_text()


def test_the_notebook_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "python.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"docs/python.ipynb, cell {number}", "exec"), names)
    assert (tmp_path / "out" / "survivors.png").is_file()


def test_a_model_in_memory_writes_its_own_text_and_keeps_its_settings(tiny) -> None:
    options = {"calibration": "self", "method": "wanda", "fit": "none", "quiet": True, **TEXT}
    model, tokenizer = gblm_compress.load(tiny("llama").folder)
    before = model.generation_config
    result = gblm_compress.prune(model, processor=tokenizer, **options)
    assert result.nonzeros < result.weights and model.generation_config is before
    model, tokenizer = gblm_compress.load(tiny("llama").folder)
    assert gblm_compress.prune(model, processor=tokenizer, **options).layers == result.layers
    tokenizer.pad_token = tokenizer.eos_token
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(DataError, match="'self' is text that a causal language model writes"):
        gblm_compress.prune(BertModel(config), processor=tokenizer, **options)


def test_a_full_disk_of_an_in_place_pruning_is_told(tiny, monkeypatch) -> None:
    monkeypatch.setattr(RunFolder, "finish", Mock(side_effect=OSError(28, "No space left on device")))
    model, _ = gblm_compress.load(tiny("llama").folder)
    with pytest.raises(OutputError, match="cannot be written .No space left on device.; gradients and pruned weights"):
        gblm_compress.prune(model, method="magnitude", fit="none", quiet=True)


def test_a_model_and_texts_in_memory_give_what_files_give(tiny, tmp_path) -> None:
    """In a folder, and then in place."""
    model, tokenizer = gblm_compress.load(tiny("llama").folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = [part for part in load_text("demo", "calibration")[:6000].split("\n\n") if part.strip()]
    rows, path = Dataset.from_dict({"text": texts}), tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"method": "wanda", "pattern": "2:4", "fit": "none", "quiet": True, **TEXT}
    from_files = gblm_compress.prune(tiny("llama").folder, tmp_path / "files", calibration=path, **options)
    options |= {"processor": tokenizer, "calibration": rows}
    beside = gblm_compress.prune(model, tmp_path / "memory", **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    inside = gblm_compress.prune(model, **options)
    expected, _ = gblm_compress.load(tmp_path / "files")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert from_files.layers == beside.layers == inside.layers
    assert (beside.folder, inside.folder) == (str(tmp_path / "memory"), None)
    assert from_files.calibration_fingerprint == beside.calibration_fingerprint
    assert inside.nonzeros * 2 == inside.weights < inside.linear_weights  # the head is among those left dense
    weights = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "files")}
    assert len(weights) == 1


def test_texts_in_memory_are_a_file_in_the_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("GBLM_COMPRESS_CACHE", str(tmp_path))
    first = Path(text_file(["a", "b"]))
    assert [json.loads(line) for line in first.read_text().splitlines()] == [{"text": "a"}, {"text": "b"}]
    os.utime(first, (0, 0))
    assert text_file([{"text": "a"}, {"text": "b"}]) == str(first) and first.stat().st_mtime > 0  # used again


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, _: gblm_compress.prune("tiny"), "is on disk; give an output folder"),
        (lambda model, _: gblm_compress.prune(model, calibration="demo"), "give the tokenizer of the model"),
        (lambda model, _: gblm_compress.prune(model, memory="1GiB", resume=True), "memory and resume would do nothing"),
        (lambda model, _: gblm_compress.prune(model, dtype="float32"), "dtype would do nothing: without an output"),
        (lambda model, _: gblm_compress.prune(model, "x", calibration="demo"), "needs its tokenizer"),
        (lambda model, _: gblm_compress.prune("tiny", "x", methd="gblm"), "methd: unknown; did you mean 'method'"),
        (lambda model, _: gblm_compress.export("tiny", "x"), "export: format: missing"),
        (lambda model, _: gblm_compress.run({"model": "tiny", "prun": 1}, "x"), "unknown key; did you mean 'prune'"),
        (lambda model, _: gblm_compress.advise("tiny", pattern="2:4", sparsity=0.6), "contradicts pattern 2:4"),
        (lambda model, _: gblm_compress.prune("tiny", "x", dataset="demo"), "dataset: unknown; known are"),
        (lambda model, _: gblm_compress.compare("tiny", "x", seed=7, calibration={"samples": 7}),
         r"seed: unknown; did you mean 'seeds'.*calibration: input should be"),
        (lambda model, _: gblm_compress.run({"model": "tiny"}, "x", set=["prune.alpha=50"]), "changes a recipe from"),
        (lambda model, words: gblm_compress.prune(model, processor=words, calibration="demo", sequence_length=600),
         "LlamaForCausalLM' has 512 positions; sequence length is 600"),
        (lambda model, words: gblm_compress.prune(model.half(), processor=words, calibration="demo", **TEXT),
         "fits in float16 lose gradients"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call, message, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "has_bfloat16", lambda device: False)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        call(*gblm_compress.load(tiny("llama").folder))
    assert not list(tmp_path.iterdir())


def test_advice_is_asked_for_with_its_settings(tiny, monkeypatch) -> None:
    monkeypatch.setattr(advice, "advise", lambda *given, progress: given)
    source, asked = gblm_compress.advise(tiny("llama").folder, blocks=2, pattern="2:4", quiet=True)
    assert (source.folder, asked.blocks, asked.pattern) == (tiny("llama").folder, 2, "2:4")


TEXT_OF = {"calibration": "prose.txt", "samples": 3, "sequence_length": 32, "device": "cpu"}
HELD_OUT = {"dataset": "prose.txt", "max_windows": 2}
WANDA = {"method": "wanda", "fit": "none", "pattern": "2:4"}
RUNNING = {"batch": (1,), "prompt": 8, "generate": 4, "repeats": 5, "runtimes": ("torch",), "device": "cpu"}
GRID = {"methods": ("magnitude+none",), "patterns": ("2:4",), "seeds": 1, "evaluation_length": 32}
TRAINING = {"teacher": "tiny", "data": ("prose.txt",), "tokens": 256, "sequence_length": 16, "batch": 2}
BOTH_WAYS = {
    "prune": (("tiny",), {"output": "new", "ignore": ("*.o_proj",), **WANDA, **TEXT_OF}),
    "plan": (("tiny",), {**WANDA, **TEXT_OF}),
    "recover": (("pruned",), {"output": "new", **TRAINING}),
    "export": (("pruned",), {"output": "new", "format": "semi-structured"}),
    "evaluate": (("pruned",), {"baseline": "tiny", "sequence_length": 32, **HELD_OUT}),
    "compare": (("tiny",), {**GRID, **TEXT_OF, **HELD_OUT}),
    "benchmark": (("pruned",), {"baseline": ("tiny",), **RUNNING}),
    "inspect": (("pruned",), {"heat_map": "map.png"}),
    "run": (("recipe.yaml",), {"set": ("prune={method: magnitude, fit: none}",), "output": "new"}),
    "report": (("run", "run"), {"output": "page.html"}),
    "push": (("run", "bitmask"), {}),
    "validate": (("recipe.yaml",), {}),
    "schema": ((), {}),
    "doctor": ((), {}),
}
NOT_ALIKE = re.compile("conditions|finished|seconds|memory|bytes|environment|measurements|warnings|checks")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "prose.txt").write_text(load_text("demo", "calibration")[:9000])
    gblm_compress.prune("tiny", folder / "pruned", pattern="2:4", method="magnitude", fit="none", quiet=True)
    (folder / "recipe.yaml").write_text("model: tiny\ncalibration: {dataset: demo, sequence_length: 64}\n")
    write_report(folder / "run")
    write_artefact(folder / "run", folder / "pruned", "---\nlicense: mit\n---\n# m\n")
    return folder


def alike(value: object) -> object:
    """Plain values without those that two runs of the same do not share."""
    if isinstance(value, dict):
        moment = value.get("subject") == "busy cores"
        return {name: alike(each) for name, each in value.items() if not (moment or NOT_ALIKE.search(name))}
    return [alike(each) for each in value] if isinstance(value, list | tuple) else value


def spelt(keywords: dict[str, object]) -> Iterator[str]:
    """Keywords of Python as options of the command line."""
    for name, value in keywords.items():
        yield f"--{name.replace('_', '-')}"
        yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("name", sorted({each.name for each in api.COMMANDS} - {"advise"}))  # it has its own test
def test_a_command_and_its_function_give_the_same(name: str, workplace, program, tmp_path, monkeypatch) -> None:
    positional, keywords = BOTH_WAYS[name]
    function = getattr(api, name)
    quiet = ["--quiet"] if "quiet" in function.command.own else []
    for place in (tmp_path, tmp_path / "python"):
        shutil.copytree(workplace, place, dirs_exist_ok=True)
    done = program(name, *positional, *spelt(keywords), "--json", *quiet)
    assert (done.code, done.stderr) == (0, "")
    monkeypatch.chdir(tmp_path / "python")
    result = function(*positional, **keywords, **({"quiet": True} if quiet else {}))
    content = result if isinstance(result, dict) else result.as_dict()
    assert alike(json.loads(done.stdout)) == alike(json.loads(as_json(content)))
    if name in summaries.SUMMARIES:
        assert all(isinstance(part, str | Text | Table) for part in summaries.parts(name, result))
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert all(f"python/{path}" in made for path in made if not path.startswith("python/"))


def test_models_in_memory_are_exported_inspected_and_evaluated(tiny, prose, tmp_path) -> None:
    dense = tiny("llama").folder
    model, tokenizer = gblm_compress.load(dense)
    gblm_compress.prune(model, processor=tokenizer, calibration=prose, method="wanda", fit="none", quiet=True, **TEXT)
    exported = gblm_compress.export(model, tmp_path / "bitmask", processor=tokenizer, format="bitmask", quiet=True)
    assert exported.folder == str(tmp_path / "bitmask")
    zeros = gblm_compress.inspect(model, processor=tokenizer, quiet=True)
    assert zeros.nonzeros * 2 == zeros.weights
    common = {"dataset": prose, "sequence_length": 32, "max_windows": 2, "quiet": True}
    beside = gblm_compress.evaluate(tmp_path / "bitmask", **common)
    direct = gblm_compress.evaluate(model, processor=tokenizer, baseline=dense, **common)
    assert direct.metrics != direct.baseline
    assert beside.metrics["perplexity"].value == pytest.approx(direct.metrics["perplexity"].value, rel=1e-4)
