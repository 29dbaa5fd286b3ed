"""Verification finds every kind of damage, and names the tensor."""

import json
import re
from importlib.metadata import version

import pytest
from safetensors.torch import load_file, save_file

from gblm_compress import manifest
from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.pruning import prune
from gblm_compress.settings import CalibrationSettings, PruneSettings

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tiny, tmp_path, progress):
    output = tmp_path / "out"
    prune(
        tiny("llama"),
        output,
        PruneSettings(method="magnitude", pattern="2:4"),
        CalibrationSettings(),
        progress=progress,
    )
    return output


def damage(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_prune_writes_verifies(folder) -> None:
    manifest.verify(folder)


def swap_zero_and_weight(state) -> None:
    group = state[f"{LAYER}.weight"][0]
    zeros, nonzeros = (group[:4] == 0).nonzero()[0], (group[4:8] != 0).nonzero()[0] + 4
    group[zeros], group[nonzeros] = group[nonzeros].clone(), 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{LAYER}.weight"), "no tensor of that name was saved"),
        (swap_zero_and_weight, r"breaks pattern 2:4 at row 0, columns 0 to 3: 3 nonzeros"),
        (lambda s: s[f"{LAYER}.weight"][0, :4].zero_(), r"nonzeros were saved, the manifest says 4096"),
        (lambda s: s[f"{LAYER}.weight"][s[f"{LAYER}.weight"] == 0].shape and s[f"{LAYER}.weight"].masked_fill_(
            s[f"{LAYER}.weight"] == 0, -0.0), "holds -0.0"),
        (lambda s: s[f"{LAYER}.weight"][0].fill_(float("nan")), "holds NaN"),
        (lambda s: s.update({f"{LAYER}.weight": s[f"{LAYER}.weight"][:5].clone()}), "saved with shape"),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(folder, change, message: str) -> None:
    damage(folder, change)
    with pytest.raises(VerificationError, match=re.escape(LAYER) + ".*" + message):
        manifest.verify(folder)


def test_a_damaged_file_is_a_model_error(folder) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="damaged safetensors"):
        manifest.verify(folder)


def test_a_folder_without_manifest_is_no_pruned_one(tmp_path) -> None:
    with pytest.raises(ModelError, match="not made by `gblm-compress prune`"):
        manifest.read(tmp_path)


def test_the_manifest_holds_every_parameter(folder) -> None:
    content = json.loads((folder / manifest.MANIFEST).read_text())
    assert content["prune"] == PruneSettings(method="magnitude", pattern="2:4").model_dump(mode="json")
    assert content["calibration"] is None  # magnitude looks at no text
    assert content["versions"]["torch"] == version("torch")
    assert "magnitude, 2:4" in (folder / "README.md").read_text()
