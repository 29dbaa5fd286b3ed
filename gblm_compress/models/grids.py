"""The grids of a pruned folder (the values its weights may take), and the verification of pruned folders.

`gblm_grids.safetensors` holds `NAME.scales` and `NAME.levels` of each layer on a grid; the manifest states its hash.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.layouts.packed import check_tensor
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import LEVELS, Grid, columns_of_a_scale, rounded
from gblm_compress.methods.zeros import count_nonzeros, has_negative_zeros, is_finite
from gblm_compress.models import manifest
from gblm_compress.models.checkpoint import Checkpoint, read_tensor
from gblm_compress.models.files import read_header, sha256_of
from gblm_compress.models.loading import load_skeleton
from gblm_compress.models.source import ModelSource

GRIDS = "gblm_grids.safetensors"
_SCALES, _LEVELS = ".scales", ".levels"


def as_tensors(grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    scales = {f"{name}{_SCALES}": grid.scales for name, grid in grids.items()}
    return scales | {f"{name}{_LEVELS}": grid.levels for name, grid in grids.items()}


def read_from(path: Path, group: int | None) -> dict[str, Grid]:
    """The grids in a file, {layer: grid}; `group` columns share a scale, or a whole row if None."""
    layers = [name.removesuffix(_SCALES) for name in read_header(path)[0] if name.endswith(_SCALES)]
    return {
        layer: Grid(read_tensor(path, f"{layer}{_SCALES}"), read_tensor(path, f"{layer}{_LEVELS}"), group)
        for layer in layers
    }


def write(folder: Path, grids: Mapping[str, Grid]) -> str | None:
    """Write {layer: grid} into a pruned folder; the file's hash for the manifest, None without grids."""
    if not grids:
        return None
    path = folder / GRIDS
    save_file({name: tensor.contiguous() for name, tensor in as_tensors(grids).items()}, path)
    return sha256_of(path)


def read_grids(source: ModelSource) -> dict[str, Grid]:
    """{layer: grid} of a pruned folder; empty if it was not quantised."""
    content, path = manifest.read_if_ours(source.folder), source.folder / GRIDS
    stated = content.get("grids_sha256")
    if stated is None:
        return {}
    if not path.is_file():  # never wait for a pipe or read a device
        raise ModelError(f"{str(path)!r} is missing or not a regular file, and the manifest lists its content")
    parts = set(read_header(path)[0])
    if sha256_of(path) != stated:
        raise ModelError(f"{str(path)!r} does not have the hash that the manifest states; it was changed")
    settings, layers = content["prune"], content["layers"]
    if parts != {f"{name}{part}" for name in layers for part in (_SCALES, _LEVELS)}:
        raise ModelError(f"{str(path)!r} does not hold the grids of the layers that the manifest lists")
    grids = read_from(path, columns_of_a_scale(settings["quantise"], settings["group"]))
    for layer, grid in grids.items():  # it must be sound before it is used, see `Grid`
        name, (rows, columns) = f"{str(path)!r}: {layer}", layers[layer]["shape"]
        groups = 1 if grid.group is None else -(-columns // grid.group)
        check_tensor(f"{name}.scales", grid.scales, [torch.float16], [rows, groups])
        check_tensor(f"{name}.levels", grid.levels, [torch.int8], [LEVELS[settings["quantise"]]])
        if (grid.scales < 0).any():
            raise ModelError(f"{name}.scales: holds a scale below zero; the file is damaged")
        if (grid.levels[1:] <= grid.levels[:-1]).any():
            raise ModelError(f"{name}.levels: do not increase; the file is damaged")
    return grids


def verify(source: ModelSource) -> None:
    """Check each pruned weight of a folder as stored; `VerificationError` names the first fault."""
    grids, layers = read_grids(source), manifest.read(source.folder)["layers"]
    checkpoint = Checkpoint(source.folder, load_skeleton(source))
    for layer, stated in layers.items():
        name = f"{layer}.weight"
        if name not in checkpoint:
            raise VerificationError(f"{name}: the manifest lists it, but no tensor of that name was saved")
        stored = checkpoint.read(name)
        weight = stored.T if stated["transposed"] else stored
        if list(weight.shape) != stated["shape"]:
            raise VerificationError(
                f"{name}: saved with shape {list(weight.shape)}, the manifest says {stated['shape']}"
            )
        if not is_finite(weight):
            raise VerificationError(f"{name}: holds NaN or infinite values")
        if has_negative_zeros(weight):
            raise VerificationError(f"{name}: holds -0.0; zeros must be +0.0")
        if violation := Pattern(stated["pattern"]).first_violation(weight):
            raise VerificationError(f"{name}: breaks pattern {stated['pattern']} at {violation}")
        if (nonzeros := count_nonzeros(weight)) != stated["nonzeros"]:
            raise VerificationError(f"{name}: {nonzeros} nonzeros were saved, the manifest says {stated['nonzeros']}")
        if not grids:
            continue
        points = rounded(weight.float(), weight != 0, grids[layer]).to(weight.dtype)
        if (off := weight != points).any():
            row, column = off.nonzero()[0].tolist()
            raise VerificationError(
                f"{name}: {float(weight[row, column]):g} in row {row}, column {column} is not on its grid; the "
                f"nearest is {float(points[row, column]):g}"
            )
