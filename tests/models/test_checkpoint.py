"""A checkpoint read by the model's names and rewritten in one stream, against transformers' own saving and loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gblm_compress.errors import ModelError
from gblm_compress.models import checkpoint as checkpoint_module
from gblm_compress.models.checkpoint import Checkpoint, save_durably
from gblm_compress.models.conversion import TensorNames
from tests.conftest import ARCHITECTURES


def checkpoint_of(folder: Path, model) -> Checkpoint:
    return Checkpoint(folder, TensorNames(model))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_rewritten_checkpoint_differs_in_what_was_changed_only(kind, sharded, tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(kind).folder)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    model.save_pretrained(source, max_shard_size="60KB" if sharded else "1GB")
    assert (source / "model.safetensors.index.json").exists() == sharded
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.dim() == 2 and "attn" in n)
    new = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter).T.contiguous().T  # any strides
    checkpoint_of(source, model).rewrite(target, lambda n: new if n == name else None)
    shutil.copy(source / "config.json", target)
    got = AutoModelForCausalLM.from_pretrained(target)
    for other, tensor in got.named_parameters():
        assert torch.equal(tensor, new if other == name else model.get_parameter(other))
    assert sorted(p.name for p in target.iterdir() if p.name != "config.json") == sorted(
        p.name for p in source.iterdir() if "safetensors" in p.name
    )


def test_a_bare_backbone_gets_the_names_of_the_whole_model(tiny, tmp_path: Path) -> None:
    """GPT-2's published files lack the prefix "transformer."."""
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2").folder)
    shutil.copy(tiny("gpt2").folder / "config.json", tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in load_file(tiny("gpt2").folder / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = checkpoint_of(tmp_path, model)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert name in checkpoint and torch.equal(checkpoint.read(name), model.get_parameter(name))
    (tmp_path / "out").mkdir()
    checkpoint.rewrite(tmp_path / "out", lambda name: None)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert name in file.keys() and file.metadata() == {"format": "pt"}  # noqa: SIM118


def test_what_is_missing_or_damaged_is_named(tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama").folder)
    with pytest.raises(ModelError, match="no.such: no such tensor in"):
        checkpoint_of(tiny("llama").folder, model).read("no.such")
    data = (tiny("llama").folder / "model.safetensors").read_bytes()
    shutil.copy(tiny("llama").folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="damaged safetensors file"):
        checkpoint_of(tmp_path, model)


def test_reading_and_writing_leave_the_file_alone(tiny, tmp_path: Path) -> None:
    """A tensor may be mapped to its file; what is done to it must not reach the file."""
    path = tmp_path / "t.safetensors"
    save_durably(path, {"a": torch.ones(3, 5).T})
    before = path.read_bytes()
    tensor = checkpoint_module.read_tensor(path, "a")
    tensor.zero_()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert json.loads(before[8 : 8 + int.from_bytes(before[:8], "little")])["a"]["shape"] == [5, 3]
