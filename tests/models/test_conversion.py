"""Files and tensors of the model, both ways, against transformers' own loading and saving."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.conversion import TensorNames
from gblm_compress.models.experts import unfuse_
from tests.families.tiny import tiny_family

# Files with a matrix for each expert, with fused experts, with experts below each other, and with renamed tensors.
KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "dbrx", "granitemoe", "hrm_text")


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_family(request.param).save_pretrained(folder)
    return folder


def test_files_are_read_as_transformers_reads_them(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    unfuse_(model)
    checkpoint = Checkpoint(saved, TensorNames(model))
    for name, parameter in model.named_parameters():
        assert name in checkpoint and torch.equal(checkpoint.read(name), parameter)


def test_what_a_model_made_of_files_goes_back_bit_for_bit(saved: Path) -> None:
    files = load_file(saved / "model.safetensors")
    names = TensorNames(AutoModelForCausalLM.from_pretrained(saved))
    for group in names.groups(files).values():
        for key, tensor in names.unmade(group, names.made(group, files.__getitem__)).items():
            assert torch.equal(tensor, files[key])


def test_a_changed_layer_is_changed_in_the_files_and_nothing_else_is(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    unfuse_(model)
    name = next((n for n in dict(model.named_parameters()) if ".experts.2." in n and n.endswith("weight")), None)
    name = name or next(n for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    new = torch.arange(model.get_parameter(name).numel(), dtype=torch.float32).view_as(model.get_parameter(name))
    Checkpoint(saved, TensorNames(model)).rewrite(tmp_path, lambda one: new if one == name else None)
    shutil.copy(saved / "config.json", tmp_path)
    got = AutoModelForCausalLM.from_pretrained(tmp_path)
    unfuse_(got)
    for other, parameter in got.named_parameters():
        assert torch.equal(parameter, new if other == name else model.get_parameter(other)), other
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(saved / "model.safetensors").keys()
