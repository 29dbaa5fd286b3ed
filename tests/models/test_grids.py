"""Folders whose weights lie on grids: every weight is held against them, and what is damaged is refused."""

import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.models import grids, loading, manifest
from gblm_compress.models.files import sha256_of
from gblm_compress.models.grids import GRIDS, read_grids
from gblm_compress.models.source import ModelSource
from tests.conftest import edit_json, edit_weights, export, flip_a_bit, saved
from tests.methods.test_fits import points_of

LAYER = "model.layers.0.mlp.up_proj"
WEIGHT, SCALES, LEVELS = (f"{LAYER}.{part}" for part in ("weight", "scales", "levels"))


@pytest.fixture
def folder(pruned, tmp_path) -> ModelSource:
    """A folder that is 2:4 and in levels of 4 bits, to be damaged."""
    written = pruned(pattern="2:4", quantise="int4", group=32).folder
    return ModelSource("out", shutil.copytree(written, tmp_path / "out"))


@pytest.mark.parametrize(
    ("kind", "dtype", "bits", "group", "levels"),
    [
        ("llama", "bfloat16", "int4", None, 16),
        ("llama", "float16", "int8", None, 255),
        ("gpt2", "float32", "int4", 128, 16),
    ],
)
def test_every_weight_is_a_scale_times_a_level(kind, bits, group, levels, dtype, pruning, tiny, tmp_path) -> None:
    source = saved(loading.load_model(tiny(kind), dtype), tmp_path / "source")
    pruning("out", source, method="magnitude", quantise=bits, group=group)
    found, layers = read_grids(ModelSource("out", tmp_path / "out")), manifest.read(tmp_path / "out")["layers"]
    assert found.keys() == layers.keys()
    name, grid = next((name, grid) for name, grid in found.items() if "mlp" in name)
    stored = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    weight = stored.T if layers[name]["transposed"] else stored
    assert weight.dtype == getattr(torch, dtype) and 0.4 < float((weight != 0).float().mean()) <= 0.5
    assert len(grid.levels) == levels and grid.group == {None: None if bits == "int8" else 64}.get(group, group)
    for row in range(0, len(weight), 17):
        for column in range(weight.shape[1]):
            points = torch.tensor([*points_of(grid, row, column), 0.0]).to(weight.dtype)
            assert weight[row, column] in points


def test_manifest_and_card_say_it_and_other_folders_have_none(folder, pruned, tiny, tmp_path) -> None:
    assert GRIDS in manifest.read(folder.folder)["files"]
    card = (folder.folder / "README.md").read_text()
    assert ", int4\n" in card and "| grid of the survivors | int4, a scale for every 32 columns |" in card
    assert read_grids(tiny("llama")) == read_grids(pruned()) == {} and not (pruned().folder / GRIDS).exists()
    assert read_grids(export(folder, tmp_path / "export", format="bitmask")[1]) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(WEIGHT), "no tensor of that name was saved"),
        (lambda s: s[WEIGHT][0, :4].fill_(1.0), r"breaks pattern 2:4 at row 0, columns 0 to 3: 4 nonzeros"),
        (lambda s: s[WEIGHT][0, :4].zero_(), r"nonzeros were saved, the manifest says \d+"),
        (lambda s: s[WEIGHT].masked_fill_(s[WEIGHT] == 0, -0.0), "holds -0.0"),
        (lambda s: s[WEIGHT].mul_(1.001), r"row 0, column \d is not on its grid; the nearest is"),
        (lambda s: s[WEIGHT][0].fill_(float("nan")), "holds NaN"),
        (lambda s: s.update({WEIGHT: s[WEIGHT][:5]}), r"has the shape \[5, 64\]"),
    ],
)
def test_damage_is_found_and_named(folder, change, message: str) -> None:
    grids.verify(folder)
    edit_weights(folder.folder, change)
    error = ModelError if "has the shape" in message else VerificationError  # the former before any weight is read
    with pytest.raises(error, match=re.escape(LAYER) + ".*" + message):
        grids.verify(folder)


def test_shapes_are_those_of_the_manifest(folder) -> None:
    content = manifest.read(folder.folder)
    content["layers"][LAYER]["shape"] = [1, 1]
    content["prune"] |= {"quantise": "none", "group": None}
    edit_json(folder.folder / manifest.MANIFEST, **content | {"grids_sha256": None})
    with pytest.raises(VerificationError, match=rf"{LAYER}.* shape \[128, 64\], the manifest says \[1, 1\]"):
        grids.verify(folder)


def restated(folder: ModelSource, change, **stated) -> None:
    """Change the grids, and the hash that the manifest states."""
    state = load_file(folder.folder / GRIDS)
    change(state)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder.folder / GRIDS)
    edit_json(folder.folder / manifest.MANIFEST, **{"grids_sha256": sha256_of(folder.folder / GRIDS)} | stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(LEVELS), "does not hold the grids of the layers"),
        (lambda s: s.update({"other.scales": s[SCALES].clone()}), "does not hold the grids of the layers"),
        (lambda s: s[SCALES].mul_(-1), "a scale below zero"),
        (lambda s: s[SCALES].fill_(float("inf")), "NaN or infinite"),
        (lambda s: s.update({SCALES: s[SCALES].float()}), "needs float16"),
        (lambda s: s.update({SCALES: s[SCALES][:, :1]}), r"needs float16 \[128, 2\]"),
        (lambda s: s.update({LEVELS: s[LEVELS][:15]}), r"needs int8 \[16\]"),
        (lambda s: s[LEVELS].zero_(), "do not increase"),
    ],
)
def test_grids_from_anywhere(change, message: str, folder) -> None:
    restated(folder, lambda state: None)
    assert read_grids(folder)
    restated(folder, change)
    with pytest.raises(ModelError, match=message):
        read_grids(folder)
    for stated in (None, 5):
        restated(folder, lambda state: None, grids_sha256=stated)
        with pytest.raises(ModelError, match="gblm_manifest.json' is damaged"):
            read_grids(folder)


def test_a_changed_or_missing_file_is_no_grid(folder) -> None:
    path = folder.folder / GRIDS
    content = path.read_bytes()
    flip_a_bit(path)
    with pytest.raises(ModelError, match="does not have the hash that the manifest states"):
        read_grids(folder)
    path.write_bytes(content[:-3])
    with pytest.raises(ModelError, match="damaged safetensors file"):
        read_grids(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="missing or not a regular file"):
        read_grids(folder)
