"""A checkpoint read by the model's names and rewritten in one stream, against transformers' own loading and saving."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gblm_compress.errors import ModelError
from gblm_compress.models.checkpoint import Checkpoint, read_tensor, save_durably
from gblm_compress.models.experts import unfuse_
from tests.families.tiny import tiny_family

# Files with a matrix for each expert, with fused experts, with experts below each other, and with renamed tensors.
CONVERTED = ("mixtral", "qwen3_moe", "gpt_oss", "dbrx", "granitemoe", "hrm_text")


def loaded(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    unfuse_(model)
    return model


@pytest.mark.parametrize("kind", [*CONVERTED, "llama", "gpt2", "opt"])
def test_files_are_read_and_rewritten_as_transformers_does_it(kind: str, tiny, tmp_path: Path) -> None:
    """One tensor is changed, and nothing else is; tensors that are given as they were give the same bytes."""
    source, target, same = folders = [tmp_path / name for name in ("source", "target", "same")]
    for folder in folders:
        folder.mkdir()
    model = tiny_family(kind) if kind in CONVERTED else AutoModelForCausalLM.from_pretrained(tiny(kind).folder)
    model.save_pretrained(source, max_shard_size="1GB" if kind in CONVERTED else "60KB")
    model = loaded(source)
    checkpoint = Checkpoint(source, model)
    for name, parameter in model.named_parameters():
        assert name in checkpoint and torch.equal(checkpoint.read(name), parameter)
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    changed = next(name for part in (".experts.2.", ".0.") for name in matrices if part in name)
    old = model.get_parameter(changed)
    new = torch.arange(old.numel(), dtype=old.dtype).view_as(old).T.contiguous().T  # any strides
    checkpoint.rewrite(target, lambda name: new if name == changed else None)
    checkpoint.rewrite(same, lambda name: checkpoint.read(name))
    shutil.copy(source / "config.json", target)
    for name, parameter in loaded(target).named_parameters():
        assert torch.equal(parameter, new if name == changed else model.get_parameter(name)), name
    files, *others = [sorted(path.name for path in folder.glob("*safetensors*")) for folder in folders]
    assert (len(files) > 1) == (kind not in CONVERTED), "several shards and an index"
    assert others == [files, files]
    for file in source.glob("*.safetensors"):
        before, after = load_file(file), load_file(same / file.name)
        assert before.keys() == after.keys() == load_file(target / file.name).keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_bare_backbone_gets_the_names_of_the_whole_model(tiny, tmp_path: Path) -> None:
    """GPT-2's published files lack the prefix "transformer."."""
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2").folder)
    shutil.copy(tiny("gpt2").folder / "config.json", tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in load_file(tiny("gpt2").folder / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, model)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert name in checkpoint and torch.equal(checkpoint.read(name), model.get_parameter(name))
    with pytest.raises(ModelError, match="no.such: no such tensor in"):
        checkpoint.read("no.such")
    (tmp_path / "out").mkdir()
    checkpoint.rewrite(tmp_path / "out", lambda name: None)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert name in file.keys() and file.metadata() == {"format": "pt"}  # noqa: SIM118


def test_reading_and_writing_leave_the_file_alone(tmp_path: Path) -> None:
    """A tensor may be mapped to its file; writing into the tensor must not reach the file."""
    path = tmp_path / "t.safetensors"
    save_durably(path, {"a": torch.ones(3, 5).T})
    before = path.read_bytes()
    read_tensor(path, "a").zero_()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert json.loads(before[8 : 8 + int.from_bytes(before[:8], "little")])["a"]["shape"] == [5, 3]
