"""The manifest and model card of a folder made here. Nothing in them depends on time."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from huggingface_hub import ModelCardData
from pydantic import AfterValidator, BaseModel, Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

import gblm_compress
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.methods.quantisation import grid_in_words
from gblm_compress.models.architecture import is_linear, prunable_layers, weight_matrix
from gblm_compress.models.files import EXPERTS, HEADS, LAYERS, WIDTHS, read_checked
from gblm_compress.models.finding import DEMO, DEMO_ON_HUB
from gblm_compress.models.loading import stored_dtype, task_of
from gblm_compress.models.source import ModelSource
from gblm_compress.printing import printable
from gblm_compress.settings.prune import Group, QuantiserName
from gblm_compress.storage.outputs import MANIFEST

# Keys of config.json that a model and its baseline share.
_SHAPES = (
    "model_type", "architectures", "vocab_size", *WIDTHS, *LAYERS, *HEADS, "num_key_value_heads", "head_dim",
    "intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", *EXPERTS,
)  # fmt: skip


class _Layer(BaseModel, strict=True):
    pattern: Annotated[str, AfterValidator(Pattern)]
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    nonzeros: NonNegativeInt
    transposed: bool


class _LeftDense(BaseModel, strict=True):
    weights: NonNegativeInt
    reason: str


class _Prune(BaseModel, strict=True):
    method: str
    pattern: str
    quantise: QuantiserName
    group: Group | None


class _Calibration(BaseModel, strict=True):
    dataset: str = ""
    samples: NonNegativeInt
    sequence_length: NonNegativeInt
    seed: NonNegativeInt


class _Base(BaseModel, strict=True):
    name: str
    sha256: str


class _Manifest(BaseModel, strict=True):
    """The keys that are read again. Others may come and go with versions: folders stay readable."""

    kind: Literal["reordered", "pruned", "export"]  # reordered: folders of 0.1.0
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
            raise ValueError("a pruned folder lists its settings and its layers")
        if self.kind == "pruned" and bool(self.prune and self.prune.quantise != "none") != bool(self.grids_sha256):
            raise ValueError("grids_sha256 is there if the settings quantise, and only then")
        return self


def write(
    folder: Path, source: ModelSource, content: dict[str, Any], *, library: str = "transformers", loading: str = ""
) -> None:
    """Write the manifest and the model card of a folder made from `source`.

    `content` has a "kind" ("pruned" or "export") and this step's keys. `loading` is Python that loads the folder, for
    the card; by default with the task's class of transformers.
    """
    before = read_if_ours(source.folder)
    # The manifest does not reveal the path of the dense model.
    name = source.name if source.name.count("/") <= 1 else source.folder.name
    if source.folder == Path(DEMO):  # a folder of that name
        name = f"./{DEMO}"
    content = {
        "kind": content["kind"],
        "gblm_compress": gblm_compress.__version__,
        "base_model": before.get("base_model", {"name": name, "sha256": source.fingerprint}),
        "source_sha256": source.fingerprint,
        "versions": {package: version(package) for package in ("torch", "transformers", "safetensors")},
        **{key: before[key] for key in ("prune", "calibration", "compute", "layers", "left_dense") if key in before},
        **content,
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not loading:
        auto_class = task_of(source).auto_class
        loading = f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("THIS FOLDER")'
    (folder / "README.md").write_text(card_text(content, library, loading), encoding="utf-8")


def card_text(content: dict[str, Any], library: str, loading: str) -> str:
    base, settings, layers = content["base_model"]["name"], content.get("prune"), content.get("layers", {})
    title, done, tags = [base.rpartition("/")[2]], [f"{base}:"], ["gblm-compress"]
    rows: dict[str, Any] = {}
    if settings:
        rows, zeros = _provenance(settings, content.get("calibration"), layers, content.get("left_dense", {}))
        if settings["pattern"] == DENSE:
            title.append(settings["quantise"])
            done.append(f"the weights in {len(layers)} layers were rounded,")
        else:
            title += [settings[key] for key in ("method", "pattern", "quantise") if settings[key] != "none"]
            done.append(f"{100 * zeros:.1f} % of the weights in its {len(layers)} pruned layers were set to zero,")
            tags = ["pruned", "sparse", *tags]
    if "recovery" in content:
        title.append("recovered")
        done.append("the others were trained,")
    if "format" in content:
        title.append(content["format"])
        done.append(f"exported as {content['format']} in {content['dtype']},")
    done.append(f"by gblm-compress {gblm_compress.__version__}.")
    on_hub = DEMO_ON_HUB if base == DEMO else printable(base)
    lines = ["---", ModelCardData(base_model=on_hub, library_name=library, tags=tags).to_yaml(), "---"]
    lines += [f"# {_plain(', '.join(title))}", "", _plain(" ".join(done)), "", "```python", loading, "```", ""]
    if rows:
        lines += ["| | |", "| --- | --- |", *(f"| {key} | {_plain(value)} |" for key, value in rows.items()), ""]
    lines += [f"All settings and the nonzeros of each layer are in `{MANIFEST}`.", ""]
    return "\n".join(lines)


def _provenance(
    settings: dict[str, Any], calibration: dict[str, Any] | None, layers: dict[str, Any], left_dense: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """The rows of the card, {property: value}, and the share of zeros."""
    nonzeros = sum(layer["nonzeros"] for layer in layers.values())
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    total = weights + sum(dense["weights"] for dense in left_dense.values())
    rows = {
        "saliency": settings["method"] if settings["pattern"] != DENSE else None,
        "pattern": settings["pattern"],
        **{key: settings.get(key) for key in ("allocation", "fit", "gradient_norm", "alpha")},
        "grid of the survivors": grid_in_words(settings["quantise"], settings["group"]),
        "calibration": calibration
        and "{samples} samples of {sequence_length} tokens, seed {seed}".format(**calibration),
        "pruned layers": f"{len(layers)}, with {100 * weights / total:.1f} % of all linear weights",
        "nonzeros in them": f"{nonzeros:,} of {weights:,}",
        "left dense": reasons(left_dense) or "no linear layer",
    }
    return {key: value for key, value in rows.items() if value not in (None, "none")}, 1 - nonzeros / weights


def _plain(value: object) -> str:
    """Text from outside in one line, neither Markdown nor HTML."""
    return re.sub(r"([\\`|\[\]])", r"\\\1", printable(str(value))).replace("<", "&lt;")


def reasons(left_dense: dict[str, dict[str, Any]]) -> str:
    """Why weights were left dense: how many layers and weights for each reason."""
    sizes: dict[str, list[int]] = {}
    for dense in left_dense.values():
        sizes.setdefault(dense["reason"], []).append(dense["weights"])
    return "; ".join(
        f"{reason}: {len(each)} layer{'s' * (len(each) > 1)}, {sum(each):,} weights" for reason, each in sizes.items()
    )


def weights_of(source: ModelSource) -> str:
    """The dtype of the weights, or int8 or int4; such as float16/float32 if the arithmetic differs."""
    checks = read_if_ours(source.folder).get("checks", {}) if source.is_onnx else {}
    stored = stored_dtype(source)
    arithmetic = checks.get("arithmetic", stored)
    return str(checks.get("weights", stored if arithmetic == stored else f"{stored}/{arithmetic}"))


def is_pruned(folder: Path) -> bool:
    return read_if_ours(folder).get("prune") is not None


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; `ModelError` if there is none."""
    missing = f"{str(folder)!r} has no {MANIFEST}: it was not made by `gblm-compress prune`"
    return read_checked(folder / MANIFEST, _Manifest, missing)


def read_if_ours(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty if there is none."""
    return read(folder) if (folder / MANIFEST).exists() else {}


def pruned_layers(source: ModelSource, model: nn.Module) -> list[str]:
    """The layers that were pruned; without a manifest, those that would be by default."""
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


def check_baseline(model: ModelSource, baseline: ModelSource) -> None:
    """`UsageError` if the shapes of both differ, or if `model` was made from another model by its manifest."""
    ours, theirs = (one.config | (one.config.get("text_config") or {}) for one in (model, baseline))
    for key in _SHAPES:
        if None not in (ours.get(key), theirs.get(key)) and ours[key] != theirs[key]:
            raise UsageError(
                f"{baseline.name!r} is not a baseline of {model.name!r}: its {key} is {theirs[key]!r}, the model's "
                f"{ours[key]!r}; give the dense model that it was made from"
            )
    base, origin = (read_if_ours(one.folder).get("base_model") for one in (model, baseline))
    if base is None or (origin is None and baseline.is_export):
        return
    if base["sha256"] not in ((origin or {}).get("sha256"), baseline.fingerprint):
        raise UsageError(
            f"{baseline.name!r} is not a baseline of {model.name!r}, which was made from {base['name']!r} by its "
            f"{MANIFEST}: the contents of the files differ; give that model, or an export of it"
        )
