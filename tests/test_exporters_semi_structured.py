"""The packed folder: restored bit for bit on a CPU; on CUDA, mocked here, the right backend for each layer."""

import json

import pytest
import torch
from torch import nn

import gblm_compress
from gblm_compress.errors import MissingDependencyError, ModelError, UsageError, VerificationError
from gblm_compress.exporters import export, semi_structured
from gblm_compress.pruning import prune
from gblm_compress.settings import CalibrationSettings, ExportSettings, PruneSettings
from gblm_compress.sources import ModelSource, load_model
from tests.conftest import ARCHITECTURES


def packed(tiny, tmp_path, progress, kind="llama", pattern="2:4", dtype="auto"):
    settings = PruneSettings(method="magnitude", pattern=pattern)
    prune(tiny(kind), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source = ModelSource("pruned", tmp_path / "pruned")
    return source, export(
        source, tmp_path / "packed", ExportSettings(format="semi-structured", dtype=dtype), progress=progress
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_restored_bit_for_bit(kind, tiny, tmp_path, progress) -> None:
    source, result = packed(tiny, tmp_path, progress, kind)
    restored, original = (
        gblm_compress.load_sparse(tmp_path / "packed").state_dict(),
        load_model(source).state_dict(),
    )
    assert restored.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(restored[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert result.checks["packed_layers"] == {"gpt2": 8, "opt": 12}.get(kind, 14)


def test_the_same_logits_and_tokens(tiny, tmp_path, progress) -> None:
    source, _ = packed(tiny, tmp_path, progress)
    sparse, dense = gblm_compress.load_sparse(tmp_path / "packed"), load_model(source)
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(sparse(input_ids=ids).logits, dense(input_ids=ids).logits)


def test_bytes_of_the_pruned_layers_in_16_bit(tiny, tmp_path, progress) -> None:
    _, result = packed(tiny, tmp_path, progress, dtype="bfloat16")
    assert result.checks["packed_bytes"] / result.checks["same_layers_dense_bytes"] == 9 / 16


def test_transformers_does_not_mistake_the_folder_for_a_dense_model(tiny, tmp_path, progress) -> None:
    from transformers import AutoModelForCausalLM

    packed(tiny, tmp_path, progress)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_what_is_not_2_4_is_refused_by_layer(tiny, tmp_path, progress) -> None:
    with pytest.raises(UsageError, match=r"14 of 14 layers are not 2:4.*\n  model\.layers\.0.*nonzeros.*\n.*\n.*"):
        packed(tiny, tmp_path, progress, pattern="unstructured")
    assert {path.name for path in tmp_path.iterdir()} == {"pruned"}


def test_a_dense_model_is_refused(tiny, tmp_path, progress) -> None:
    with pytest.raises(UsageError, match="prune with `--pattern 2:4` first"):
        export(tiny("llama"), tmp_path / "out", ExportSettings(format="semi-structured"), progress=progress)


def test_a_folder_of_another_kind(tiny) -> None:
    with pytest.raises(ModelError, match=r"has no gblm_sparse\.json"):
        gblm_compress.load_sparse(tiny("llama").folder)


def test_a_damaged_folder(tiny, tmp_path, progress) -> None:
    packed(tiny, tmp_path, progress)
    (tmp_path / "packed" / "gblm_sparse.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="damaged export"):
        gblm_compress.load_sparse(tmp_path / "packed")


def test_cuda_is_an_error_where_there_is_none(tiny, tmp_path, progress, monkeypatch) -> None:
    packed(tiny, tmp_path, progress)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="finds no CUDA device"):
        gblm_compress.load_sparse(tmp_path / "packed", "cuda")


def test_verification_notices_a_changed_weight(tiny, tmp_path, progress, monkeypatch) -> None:
    unpack = semi_structured.unpack
    monkeypatch.setattr(semi_structured, "unpack", lambda values, positions: unpack(values * 1.001, positions))
    with pytest.raises(VerificationError, match=r"model\.layers\.0.*does not restore it bit for bit"):
        packed(tiny, tmp_path, progress)


class FakeBackend:
    """Stands in for torch's semi-structured tensor classes, which need CUDA."""

    def __init__(self, name: str, least_rows: int) -> None:
        self.BACKEND, self._least_rows = name, least_rows

    def from_dense(self, weight):
        if weight.shape[0] < self._least_rows:
            raise RuntimeError(f"Error original_tensor.shape {tuple(weight.shape)} is not supported!\nmore")
        return weight.clone()


def test_placement_on_cuda_prefers_cusparselt_then_cutlass_then_says_why_dense(monkeypatch) -> None:
    monkeypatch.setattr("torch.sparse.SparseSemiStructuredTensorCUSPARSELT", FakeBackend("cusparselt", 64))
    monkeypatch.setattr("torch.sparse.SparseSemiStructuredTensorCUTLASS", FakeBackend("cutlass", 32))
    place = semi_structured._place_
    assert place(nn.Linear(64, 64), "cuda").backend == "cusparselt"
    assert place(nn.Linear(64, 32), "cuda:0").backend == "cutlass"
    small = place(nn.Linear(64, 8), "cuda")
    assert small.backend == "dense" and "cusparselt: " in small.reason and "cutlass: " in small.reason
    assert place(nn.Linear(64, 64), "cpu").backend == "dense"
    from transformers.pytorch_utils import Conv1D

    assert "Conv1D" in place(Conv1D(64, 64), "cuda").reason


def test_the_config_names_the_layers(tiny, tmp_path, progress) -> None:
    packed(tiny, tmp_path, progress, kind="gpt2")
    content = json.loads((tmp_path / "packed" / "gblm_sparse.json").read_text())
    assert content["layout"] == "sparse24"
    assert content["layers"] == content["transposed"] and len(content["layers"]) == 8
