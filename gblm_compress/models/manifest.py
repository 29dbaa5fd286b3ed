"""The manifest of a folder that this program made: what was done, from what, and what its tensors must look like.

`write` and `write_export` put `gblm_manifest.json` and a model card into a folder; `verify` reopens a pruned folder and
holds every pruned tensor against the manifest. Nothing in it depends on the time of day: same seed, same bytes.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

import gblm_compress
from gblm_compress.errors import ModelError, UsageError, VerificationError, first_line
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import QUANTISERS
from gblm_compress.methods.zeros import count_nonzeros, has_negative_zeros, is_finite
from gblm_compress.models import card
from gblm_compress.models.architecture import is_linear, prunable_layers, weight_matrix
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.conversion import TensorNames
from gblm_compress.models.loading import load_skeleton, stored_dtype, task_of
from gblm_compress.models.source import ModelSource
from gblm_compress.storage.outputs import MANIFEST
from gblm_compress.storage.records import read_json

PACKAGES = ("torch", "transformers", "safetensors")
_Count = Annotated[int, Field(ge=0)]


class _Layer(BaseModel):
    """A pruned layer, as the manifest states it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    pattern: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    nonzeros: _Count
    transposed: bool
    by_magnitude: bool = False
    output_error: Annotated[float, Field(ge=0)] | None = None


class _LeftDense(BaseModel):
    """Linear weights that were not pruned, as the manifest states them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weights: _Count
    reason: str


class _Prune(BaseModel):
    """Settings of a pruning. They are plain values, of which those that are read again are checked: a folder stays
    readable when an option comes or goes.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    method: str
    pattern: str
    quantise: str
    group: Literal["row"] | Annotated[int, Field(ge=1)] | None

    @field_validator("quantise")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in QUANTISERS:
            raise ValueError(f"{value!r} is none of {', '.join(QUANTISERS)}")
        return value


class _Calibration(BaseModel):
    """The text that statistics were measured on."""

    model_config = ConfigDict(extra="allow", strict=True)

    samples: _Count
    sequence_length: _Count
    seed: _Count
    fingerprint: str


class _Base(BaseModel):
    """The model that a folder was made from."""

    model_config = ConfigDict(strict=True)

    name: str
    sha256: str


class _Manifest(BaseModel):
    """What is read again of a manifest, with the types it must have."""

    model_config = ConfigDict(extra="allow", strict=True)

    kind: Literal["pruned", "export"]
    base_model: _Base
    layers: dict[str, _Layer] = {}
    left_dense: dict[str, _LeftDense] = {}
    prune: _Prune | None = None
    calibration: _Calibration | None = None
    grids_sha256: str | None = None
    checks: dict[str, Any] = {}

    @model_validator(mode="after")
    def _pruned_layers_are_listed(self) -> Self:
        if (self.kind == "pruned" or self.prune) and not (self.layers and self.prune):
            raise ValueError("what is pruned has its settings and its layers listed")
        if self.kind == "pruned" and bool(self.prune and self.prune.quantise != "none") != bool(self.grids_sha256):
            raise ValueError("grids_sha256 is there where the settings quantise, and nowhere else")
        return self


def write(
    folder: Path,
    *,
    source: ModelSource,
    settings: dict[str, Any],
    calibration: dict[str, Any] | None,
    compute: dict[str, str],
    layers: dict[str, dict[str, Any]],
    left_dense: dict[str, dict[str, Any]],
    grids_sha256: str | None,
) -> None:
    """Write the manifest and the model card of a pruned folder.

    Args:
        layers: {name: {"pattern", "shape", "nonzeros", "transposed", "by_magnitude", "output_error"}} of the pruned
            layers.
        left_dense: {name: {"weights", "reason"}} of all other linear weights.
        grids_sha256: hash of the file of grids; None where there is none.
    """
    content = {
        "kind": "pruned",
        "gblm_compress": gblm_compress.__version__,
        "base_model": _base_model(source),
        "source_sha256": source.fingerprint,
        "prune": settings,
        "calibration": calibration,
        "compute": compute,
        "versions": {package: version(package) for package in PACKAGES},
        "layers": layers,
        "left_dense": left_dense,
        **({"grids_sha256": grids_sha256} if grids_sha256 else {}),
    }
    on_grid = "" if grids_sha256 is None else f", {settings['quantise']}"
    title = f"{_short(content)}, {settings['method']}, {settings['pattern']}{on_grid}"
    _write(folder, content, card.PRUNED, "transformers", title, auto_class=task_of(source).auto_class)


def write_recovered(
    folder: Path, *, source: ModelSource, recovery: dict[str, Any], nonzeros: dict[str, int], grids_sha256: str | None
) -> None:
    """Write the manifest and the model card of a pruned folder whose weights were trained.

    Args:
        source: the pruned folder; its manifest is carried on.
        recovery: what was done, and what it brought.
        nonzeros: {pruned layer: how many it has now}.
        grids_sha256: as for `write`.
    """
    pruned = read(source.folder)
    layers = {
        name: {**layer, "nonzeros": nonzeros[name], "output_error": None} for name, layer in pruned["layers"].items()
    }
    content = {
        **{key: value for key, value in pruned.items() if key != "grids_sha256"},
        "gblm_compress": gblm_compress.__version__,
        "source_sha256": source.fingerprint,
        "versions": {package: version(package) for package in PACKAGES},
        "layers": layers,
        "recovery": recovery,
        **({"grids_sha256": grids_sha256} if grids_sha256 else {}),
    }
    title = f"{_short(content)}, {pruned['prune']['method']}, {pruned['prune']['pattern']}, recovered"
    _write(folder, content, card.PRUNED, "transformers", title, auto_class=task_of(source).auto_class)


def write_export(
    folder: Path,
    *,
    source: ModelSource,
    format: str,
    dtype: str,
    library: str,
    loading: str,
    checks: dict[str, Any],
) -> None:
    """Write the manifest and the model card of an export; both carry on what the source's manifest says.

    Args:
        library: what loads the folder, as the hub calls it.
        loading: the lines of Python that load the folder, for the card.
        checks: what verification found.
    """
    content: dict[str, Any] = {
        "kind": "export",
        "gblm_compress": gblm_compress.__version__,
        "format": format,
        "dtype": dtype,
        "base_model": _base_model(source),
        "source_sha256": source.fingerprint,
        "checks": checks,
        "versions": {package: version(package) for package in PACKAGES},
        **_carried(source, "prune", "calibration", "layers", "left_dense"),
    }
    _write(folder, content, card.EXPORT, library, f"{_short(content)}, {format}", loading=loading)


def _write(folder: Path, content: dict[str, Any], template: str, library: str, title: str, **more: str) -> None:
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card.write(folder, content, template, library, title, **more)


def _carried(source: ModelSource, *names: str) -> dict[str, Any]:
    """What the manifest of a folder says under some of its keys, as far as there is one and it has them."""
    content = read(source.folder) if is_ours(source.folder) else {}
    return {name: content[name] for name in names if name in content}


def _base_model(source: ModelSource) -> dict[str, str]:
    """The dense model that everything started from: its fingerprint, and its hub id or the name of its folder.

    Where it lies on this machine's disk is nobody else's business.
    """
    if is_ours(source.folder):
        base: dict[str, str] = read(source.folder)["base_model"]
        return base
    name = source.name if "/" not in source.name or source.name.count("/") == 1 else source.folder.name
    return {"name": name, "sha256": source.fingerprint}


def _short(content: dict[str, Any]) -> str:
    name: str = content["base_model"]["name"]
    return name.rpartition("/")[2]


def weights_of(source: ModelSource) -> str:
    """What weights are stored in: a dtype, or int8 or int4 in an ONNX export with levels of so many bits; or two
    dtypes, such as float16/float32, where the second is that of the arithmetic and another than is stored."""
    checks = read(source.folder).get("checks", {}) if source.is_onnx and is_ours(source.folder) else {}
    stored = stored_dtype(source)
    arithmetic = checks.get("arithmetic", stored)
    return str(checks.get("weights", stored if arithmetic == stored else f"{stored}/{arithmetic}"))


def is_ours(folder: Path) -> bool:
    """Whether a folder carries a manifest."""
    return (folder / MANIFEST).exists()


def is_pruned(folder: Path) -> bool:
    """Whether a folder carries the manifest of a model that was pruned.

    Raises:
        ModelError: the manifest is damaged.
    """
    return is_ours(folder) and read(folder).get("prune") is not None


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that this program made.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    try:
        content = read_json(folder / MANIFEST)
        _Manifest.model_validate(content)
        for layer in content.get("layers", {}).values():
            Pattern(layer["pattern"])
        return content
    except FileNotFoundError as error:
        raise ModelError(f"{str(folder)!r} has no {MANIFEST}: it was not made by `gblm-compress prune`") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ModelError(f"{str(folder)!r}: {MANIFEST} is damaged ({where}: {fault['msg']})") from error
    except (OSError, ValueError, UsageError) as error:
        raise ModelError(f"{str(folder)!r}: {MANIFEST} is damaged ({first_line(error)})") from error


def pruned_layers(source: ModelSource, model: nn.Module) -> list[str]:
    """The layers that pruning touched; without a manifest, all that it would touch by default.

    Raises:
        ModelError: the manifest is damaged, or names what is no linear layer of that shape in the model.
    """
    if not is_pruned(source.folder):
        return [name for block in prunable_layers(model) for name in block]
    modules, layers = dict(model.named_modules()), read(source.folder)["layers"]
    for name, layer in layers.items():
        module = modules.get(name)
        if module is None or not is_linear(module) or list(weight_matrix(module).shape) != layer["shape"]:
            raise ModelError(
                f"{str(source.folder)!r}: {MANIFEST} lists {name!r} with shape {layer['shape']}, and the model has no "
                "such linear layer; the manifest belongs to another model"
            )
    return list(layers)


def verify(folder: Path) -> None:
    """Reopen a pruned folder and check each pruned tensor against its pattern and its manifest.

    Raises:
        VerificationError: a tensor is missing, breaks its pattern, has another number of nonzeros, or holds
            -0.0, NaN or infinity; the message names it.
    """
    layers = read(folder)["layers"]
    for layer, tensor in pruned_tensors(ModelSource(str(folder), folder)):
        _verify_tensor(f"{layer}.weight", tensor, layers[layer])


def pruned_tensors(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """(layer, its weight as the model stores it) of all layers that the manifest of a pruned folder lists.

    Raises:
        VerificationError: there is no such tensor.
        ModelError: a file is damaged.
    """
    checkpoint = Checkpoint(source.folder, TensorNames(load_skeleton(source)))
    for layer in read(source.folder)["layers"]:
        if f"{layer}.weight" not in checkpoint:
            raise VerificationError(f"{layer}.weight: the manifest lists it, but no tensor of that name was saved")
        yield layer, checkpoint.read(f"{layer}.weight")


def _verify_tensor(name: str, tensor: Tensor, layer: dict[str, Any]) -> None:
    shape = tuple(layer["shape"])
    if layer["transposed"]:
        tensor = tensor.T
    if tensor.shape != shape:
        raise VerificationError(f"{name}: saved with shape {tuple(tensor.shape)}, the manifest says {shape}")
    if not is_finite(tensor):
        raise VerificationError(f"{name}: holds NaN or infinite values")
    if has_negative_zeros(tensor):
        raise VerificationError(f"{name}: holds -0.0; zeros must be +0.0")
    if violation := Pattern(layer["pattern"]).first_violation(tensor):
        raise VerificationError(f"{name}: breaks pattern {layer['pattern']} at {violation}")
    if (nonzeros := count_nonzeros(tensor)) != layer["nonzeros"]:
        raise VerificationError(f"{name}: {nonzeros} nonzeros were saved, the manifest says {layer['nonzeros']}")
