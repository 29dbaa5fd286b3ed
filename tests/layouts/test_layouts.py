"""The registry of layouts, and the layout of docs/adding-a-layout.md: one line and one file outside the package."""

import pytest

from gblm_compress.layouts import LAYOUTS
from tests.scripts import ROOT, blocks, python

LINE, FILE = blocks("python", page=ROOT / "docs" / "adding-a-layout.md")
USE = """
import json
from pathlib import Path

from gblm_compress.layouts import LAYOUTS, Layout

LINE

import torch
from transformers import AutoModelForCausalLM

import gblm_compress

gblm_compress.prune("tiny", "pruned", method="magnitude", fit="none", pattern="2:4", quiet=True)
gblm_compress.export("pruned", "packed", format="toy-int8", quiet=True)
dense, packed = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("pruned", "packed"))
layer, weight = packed.model.layers[0].mlp.up_proj, dense.model.layers[0].mlp.up_proj.weight
assert (layer.layout, layer.kernel(1)) == ("toy", "dense product of the unpacked weight")
assert 0.17 < layer.packed_bytes / weight.nbytes < 0.18
ids = torch.arange(12).reshape(2, 6)
with torch.no_grad():
    logits, expected = packed(input_ids=ids).logits, dense(input_ids=ids).logits
assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
checks = json.loads(Path("packed/gblm_manifest.json").read_text())["checks"]
assert checks["restored_within"] == 1 / 127 and "restored_bit_for_bit" not in checks
assert checks["logits_relative_difference"] < 1e-5
"""


def test_a_layout_from_outside_packs_exports_reloads_and_multiplies(tmp_path) -> None:
    (tmp_path / "toy.py").write_text(FILE)
    (tmp_path / "use.py").write_text(USE.replace("LINE", LINE))
    python("use.py", folder=tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_registry_and_the_kinds_say_the_same(name: str) -> None:
    layout = LAYOUTS[name]
    assert layout.kind.width == layout.width
    assert (layout.pattern == "2:4") == (layout.kind.mask.stored == "two of four")
