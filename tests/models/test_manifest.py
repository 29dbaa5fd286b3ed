"""Verification finds every kind of damage, and names the tensor."""

import json
import re
from importlib.metadata import version

import pytest
from safetensors.torch import load_file, save_file

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.exporters import export
from gblm_compress.models import manifest
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, ExportSettings, PruneSettings

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tiny, tmp_path, progress):
    output = tmp_path / "out"
    prune(
        tiny("llama"),
        output,
        PruneSettings(method="magnitude", pattern="2:4", fit="none"),
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
    assert content["prune"] == PruneSettings(method="magnitude", pattern="2:4", fit="none").model_dump(mode="json")
    assert content["calibration"] is None  # magnitude looks at no text
    assert content["versions"]["torch"] == version("torch")
    assert "magnitude, 2:4" in (folder / "README.md").read_text()


@pytest.mark.parametrize("format", ["bitmask", "semi-structured"])
def test_an_export_says_where_it_comes_from_and_how_it_is_loaded(format, folder, tiny, tmp_path, progress) -> None:
    source = ModelSource("out", folder)
    export(source, tmp_path / "export", ExportSettings(format=format), progress=progress)
    content = manifest.read(tmp_path / "export")
    assert content["base_model"]["sha256"] == tiny("llama").fingerprint
    assert content["source_sha256"] == source.fingerprint and content["prune"]["method"] == "magnitude"
    card = (tmp_path / "export" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(tmp_path / "export"))
    loaded: dict = {}
    exec(code, loaded)  # the lines of the card, as a reader would run them
    assert loaded["model"].config.num_hidden_layers == 2 and loaded["tokenizer"]("a")["input_ids"]


def test_what_is_pruned_already_is_said(folder, tiny, tmp_path, progress) -> None:
    settings = PruneSettings(method="magnitude", sparsity=0.3, fit="none")
    again = prune(ModelSource("out", folder), tmp_path / "again", settings, CalibrationSettings(), progress=progress)
    assert "out is pruned already (2:4, 50.0 % zeros); zeros stay zeros" in again.warnings[0]
    assert manifest.read(tmp_path / "again")["base_model"]["sha256"] == tiny("llama").fingerprint


DAMAGED = [
    ("[]", "not an object"),
    ('{"kind": "pruned"}', "base_model: Field required"),
    ({"layers": {}}, "has its settings and its layers listed"),
    ({"kind": "export", "layers": {}}, "has its settings and its layers listed"),
    ({"prune": 5}, "prune: "),
    ({"prune": {"method": "x |\n# INJECTED"}}, "prune.method: "),
    ({"calibration": []}, "calibration: "),
    ({"checks": []}, "checks: "),
    ({"left_dense": []}, "left_dense: "),
    ({"left_dense": {"a": {}}}, "left_dense.a.weights: Field required"),
    ({"left_dense": {"a": {"weights": "x", "reason": "y"}}}, "left_dense.a.weights"),
    ({"layers": {LAYER: {"pattern": "2:4", "shape": [0, 0], "nonzeros": 0, "transposed": False}}}, "shape"),
    ({"layers": {LAYER: {"pattern": "2:4", "shape": [1], "nonzeros": 1, "transposed": False}}}, "shape"),
    ({"layers": {LAYER: {"pattern": "2:x", "shape": [1, 1], "nonzeros": 1, "transposed": False}}}, "pattern '2:x'"),
    ({"layers": {LAYER: {"pattern": "2:4", "shape": [1, 1], "nonzeros": -1, "transposed": False}}}, "nonzeros"),
]


def test_settings_that_are_none_make_no_pruned_folder(folder) -> None:
    path = folder / manifest.MANIFEST
    assert manifest.is_pruned(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "export", "prune": None, "layers": {}}))
    assert not manifest.is_pruned(folder)


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_manifest_from_anywhere(change, message: str, folder) -> None:
    path = folder / manifest.MANIFEST
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        manifest.read(folder)


def test_a_manifest_of_another_model_exports_nothing(folder, tmp_path, progress) -> None:
    path = folder / manifest.MANIFEST
    content = json.loads(path.read_text())
    content["layers"]["model.embed_tokens"] = content["layers"].pop(LAYER)
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="lists 'model.embed_tokens'.*belongs to another model"):
        export(ModelSource("out", folder), tmp_path / "x", ExportSettings(format="bitmask"), progress=progress)
