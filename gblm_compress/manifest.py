"""The manifest of a pruned folder: what was done to it, and what its tensors must therefore look like.

`write` puts `gblm_manifest.json` and a model card into a folder; `verify` reopens the folder and holds every
pruned tensor against the manifest. Nothing in it depends on the time of day: same seed, same bytes.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Template
from torch import Tensor, nn

import gblm_compress
from gblm_compress.architecture import prunable_layers
from gblm_compress.checkpoint import keys, read_tensor
from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.patterns import Pattern
from gblm_compress.sources import ModelSource
from gblm_compress.zeros import count_nonzeros, has_negative_zeros, is_finite

MANIFEST = "gblm_manifest.json"
PACKAGES = ("torch", "transformers", "safetensors")

_MODEL_CARD = Template(
    """---
base_model: {{ base }}
library_name: transformers
tags: [pruned, sparse, gblm-compress]
---
# {{ name }}, {{ settings.method }}, {{ settings.pattern }}

{{ base }} with {{ "%.1f" % (100 * zeros) }} % of the weights in its {{ layers | length }} pruned layers set to zero \
by gblm-compress {{ version }}, without retraining on anything but the calibration text.

| | |
| --- | --- |
| saliency | {{ settings.method }} |
| pattern | {{ settings.pattern }} |
{% if settings.allocation != "uniform" -%}
| allocation | {{ settings.allocation }} |
{% endif -%}
{% if settings.refine != "none" -%}
| refinement of the mask | {{ settings.refine }} |
{% endif -%}
{% if settings["update"] != "none" -%}
| update of the survivors | {{ settings["update"] }} |
{% endif -%}
{% if settings.distillation_epochs -%}
| distillation | at most {{ settings.distillation_epochs }} passes over the calibration text |
{% endif -%}
{% if settings.method in ("gblm", "gradient") -%}
| gradient norm | {{ settings.gradient_norm }} |
{% endif -%}
{% if settings.method == "gblm" -%}
| alpha | {{ settings.alpha }} |
{% endif -%}
{% if calibration -%}
| calibration | {{ calibration.samples }} samples of {{ calibration.sequence_length }} tokens, \
seed {{ calibration.seed }} |
{% endif -%}
| nonzeros | {{ "{:,}".format(nonzeros) }} of {{ "{:,}".format(weights) }} |

The weights are stored dense; `AutoModelForCausalLM.from_pretrained` loads this folder as it is. Every parameter, the
fingerprint of the calibration text and the nonzeros of each layer are in `gblm_manifest.json`.
"""
)


def write(
    folder: Path,
    *,
    source: ModelSource,
    settings: dict[str, Any],
    calibration: dict[str, Any] | None,
    compute: dict[str, str],
    layers: dict[str, dict[str, Any]],
) -> None:
    """Write the manifest and the model card.

    Args:
        layers: {name: {"pattern", "shape", "nonzeros", "transposed"}} of the pruned layers.
    """
    base = source.name if "/" not in source.name or source.name.count("/") == 1 else source.folder.name
    content = {
        "gblm_compress": gblm_compress.__version__,
        "base_model": {"name": base, "sha256": source.fingerprint},
        "prune": settings,
        "calibration": calibration,
        "compute": compute,
        "versions": {package: version(package) for package in PACKAGES},
        "layers": layers,
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    nonzeros = sum(layer["nonzeros"] for layer in layers.values())
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    card = _MODEL_CARD.render(
        base=base,
        name=base.rpartition("/")[2],
        version=gblm_compress.__version__,
        settings=settings,
        calibration=calibration,
        layers=layers,
        nonzeros=nonzeros,
        weights=weights,
        zeros=1 - nonzeros / weights,
    )
    (folder / "README.md").write_text(card + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a pruned folder.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{str(folder)!r} has no {MANIFEST}: it was not made by `gblm-compress prune`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(folder)!r}: {MANIFEST} is damaged ({error})") from error


def pruned_layers(source: ModelSource, model: nn.Module) -> list[str]:
    """The layers that pruning touched; without a manifest, all that it would touch by default."""
    if (source.folder / MANIFEST).exists():
        return list(read(source.folder)["layers"])
    return [name for block in prunable_layers(model) for name in block]


def verify(folder: Path) -> None:
    """Reopen a pruned folder and check each pruned tensor against its pattern and its manifest.

    Raises:
        VerificationError: a tensor is missing, breaks its pattern, has another number of nonzeros, or holds
            -0.0, NaN or infinity; the message names it.
    """
    layers = read(folder)["layers"]
    seen = set()
    for name, tensor in tensors(folder):
        layer = name.removesuffix(".weight")
        if layer not in layers or layer == name:
            continue
        seen.add(layer)
        _verify_tensor(name, tensor, layers[layer])
    if missing := sorted(set(layers) - seen):
        raise VerificationError(f"{missing[0]}.weight: the manifest lists it, but no tensor of that name was saved")


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time.

    Raises:
        ModelError: a file is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        for name in keys(path):
            yield name, read_tensor(path, name)


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
