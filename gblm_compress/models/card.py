"""The model card of a folder that this program made, from its manifest."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

import gblm_compress
from gblm_compress.methods.quantisation import grid_in_words
from gblm_compress.printing import printable

_MARKDOWN = re.compile(r"([\\`|\[\]])")

_PROVENANCE = """
| | |
| --- | --- |
| saliency | {{ settings.method }} |
| pattern | {{ settings.pattern }} |
{% if settings.allocation != "uniform" -%}
| allocation | {{ settings.allocation }} |
{% endif -%}
{% if settings["update"] != "none" -%}
| update of the survivors | {{ settings["update"] }} |
{% endif -%}
{% if grid -%}
| grid of the survivors | {{ grid }} |
{% endif -%}
{% if settings.distillation_epochs -%}
| distillation | at most {{ settings.distillation_epochs }} passes over the calibration text |
{% endif -%}
{% if settings.method in ("gblm", "gradient") -%}
| gradient norm | {{ settings.gradient_norm }} |
{% endif -%}
{% if settings.method in ("gblm", "regional") -%}
| alpha | {{ settings.alpha }} |
{% endif -%}
{% if calibration -%}
| calibration | {{ calibration.samples }} samples of {{ calibration.sequence_length }} tokens, \
seed {{ calibration.seed }} |
{% endif -%}
| pruned layers | {{ layers | length }}, with {{ "%.1f" % (100 * share) }} % of all linear weights |
| nonzeros in them | {{ "{:,}".format(nonzeros) }} of {{ "{:,}".format(weights) }} |
| left dense | {{ dense or "no linear layer" }} |
"""

_HEAD = """---
base_model: {{ base | tojson }}
library_name: {{ library }}
tags: [{{ "pruned, sparse, " if layers else "" }}gblm-compress]
---
# {{ title }}
"""

PRUNED = (
    _HEAD
    + """
{{ base }} with {{ "%.1f" % (100 * zeros) }} % of the weights in its {{ layers | length }} pruned layers set to zero \
by gblm-compress {{ version }}, without retraining on anything but the calibration text.
"""
    + _PROVENANCE
    + """
{% if grid %}The surviving weights lie on grids, each a scale times a level: both are in `gblm_grids.safetensors`.
{% endif -%}
The weights are stored dense; `{{ auto_class }}.from_pretrained` loads this folder as it is. Every parameter, the
fingerprint of the calibration text and the nonzeros of each layer are in `gblm_manifest.json`.
"""
)

EXPORT = (
    _HEAD
    + """
{{ base }}{{ ", pruned and" if settings else "," }} exported as {{ format }} in {{ dtype }} by gblm-compress \
{{ version }}.

```python
{{ loading }}
```
{% if settings %}"""
    + _PROVENANCE
    + """{% endif %}
What was exported, and what verification found, is in `gblm_manifest.json`.
"""
)


def write(folder: Path, content: dict[str, Any], template: str, library: str, title: str, **more: str) -> None:
    """Write the card of a folder.

    Args:
        content: the manifest.
        template: `PRUNED` or `EXPORT`.
        library: what loads the folder, as the hub calls it.
        more: code of our own that the template names.
    """
    layers: dict[str, dict[str, Any]] = content.get("layers", {})
    left_dense: dict[str, dict[str, Any]] = content.get("left_dense", {})
    settings = content.get("prune")
    nonzeros = sum(layer["nonzeros"] for layer in layers.values())
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    total = weights + sum(dense["weights"] for dense in left_dense.values())
    text = Environment(finalize=_plain).from_string(template).render(
        base=printable(content["base_model"]["name"]),
        title=title,
        library=library,
        version=gblm_compress.__version__,
        settings=settings,
        grid=grid_in_words(settings["quantise"], settings["group"]) if settings else None,
        calibration=content.get("calibration"),
        format=content.get("format"),
        dtype=content.get("dtype"),
        layers=layers,
        nonzeros=nonzeros,
        weights=weights,
        share=weights / total if total else 0.0,
        dense=reasons(left_dense),
        zeros=1 - nonzeros / weights if weights else 0.0,
        **{name: Markup(code) for name, code in more.items()},
    )  # fmt: skip
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """Text from outside as a card shows it: one line, neither Markdown nor HTML. Code of our own stays as it is."""
    if type(value) is not str:
        return value
    return _MARKDOWN.sub(r"\\\1", printable(value)).replace("<", "&lt;")


def reasons(left_dense: dict[str, dict[str, Any]]) -> str:
    """What was left dense and why, in words: how many layers and weights for each reason."""
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for dense in left_dense.values():
        layers[dense["reason"]] += 1
        weights[dense["reason"]] += dense["weights"]
    return "; ".join(
        f"{reason}: {count} layer{'s' * (count > 1)}, {weights[reason]:,} weights" for reason, count in layers.items()
    )
