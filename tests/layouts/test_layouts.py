"""The registry of layouts, and a layout that stands outside the package: one entry, and everything works with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gblm_compress.layouts import LAYOUTS, known

# Eight bits for each weight and a scale for each row: a layout that rounds, and has no kernels of its own.
TOY = """
import torch
from torch import nn

from gblm_compress.layouts.packed import DTYPES, check_tensor
from gblm_compress.layouts.packed_linear import PackedLinear, operator


def product(x, tensors, bias, *_):
    values, scales = tensors
    return nn.functional.linear(x, values * scales, bias)


class ToyLinear(PackedLinear):
    LAYOUT = "toy"
    PACKED = ("values", "scales")
    OPERATOR = operator("toy_linear", product, product)
    TOLERANCE = 1 / 127

    def __init__(self, shape, bias, dtype, device=None):
        super().__init__(shape, bias, dtype, device)
        self.register_buffer("values", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(shape[0], 1, dtype=dtype, device=device))

    @property
    def dtype(self):
        return self.scales.dtype

    @staticmethod
    def bits(width):
        return 8, 0

    @classmethod
    def from_dense(cls, weight, bias):
        scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        values = (weight / scales).round().to(torch.int8)
        return cls(weight.shape, bias is not None, weight.dtype, "meta").filled(bias, values=values, scales=scales)

    def check(self):
        check_tensor("values", self.values, (torch.int8,), (self.out_features, self.in_features))
        check_tensor("scales", self.scales, DTYPES, (self.out_features, 1))
        super().check()

    def dense_weight(self):
        return self.values * self.scales
"""
USE = """
import json
import sys
from pathlib import Path

from gblm_compress.layouts import LAYOUTS, Layout

LAYOUTS["toy"] = Layout("toy:ToyLinear", "toy-int8", ())

import torch
from transformers import AutoModelForCausalLM

from gblm_compress.cli.app import main
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny
from gblm_compress.settings import ExportSettings

build_tiny("llama", Path("tiny"))
for arguments in (
    ["prune", "tiny", "-o", "pruned", "--method", "magnitude", "--fit", "none", "--pattern", "2:4", "--quiet"],
    ["export", "pruned", "-o", "packed", "--format", "toy-int8", "--quiet"],
):
    sys.argv = ["gblm-compress", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
dense, packed = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("pruned", "packed"))
layer = packed.model.layers[0].mlp.up_proj
ids = torch.arange(12).reshape(2, 6)
with torch.no_grad():
    logits, expected = packed(input_ids=ids).logits, dense(input_ids=ids).logits
    compiled = torch.compile(packed, backend="aot_eager")(input_ids=ids).logits
source = ModelSource("packed", Path("packed"))
result = {
    "layer": type(layer).__name__,
    "kernel": layer.kernel(1),
    "share": layer.packed_bytes / dense.model.layers[0].mlp.up_proj.weight.nbytes,
    "difference": float((logits - expected).abs().max() / expected.abs().max()),
    "compiled": torch.equal(compiled, logits),
    "is_packed": source.is_packed,
    "needs_cuda": source.needs_cuda,
    "checks": json.loads(Path("packed/gblm_manifest.json").read_text())["checks"],
}
Path("result.json").write_text(json.dumps(result))
"""


def test_a_layout_from_outside_packs_exports_reloads_and_multiplies(tmp_path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "use.py").write_text(USE)
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["layer"], result["kernel"]) == ("ToyLinear", "dense product of the unpacked weight")
    assert 0.25 < result["share"] < 0.27
    assert 0 < result["difference"] < 0.05 and result["compiled"]
    assert result["is_packed"] and not result["needs_cuda"]
    assert result["checks"]["restored_within"] == 1 / 127 and "restored_bit_for_bit" not in result["checks"]
    assert result["checks"]["logits_relative_difference"] < 1e-5
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["layout"] == "toy"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_registry_and_the_file_say_the_same(name: str) -> None:
    layout = LAYOUTS[name]
    assert name == layout.layer.LAYOUT and known(name) is layout


def test_what_is_no_layout() -> None:
    assert known("csr") is known(["bitmask"]) is known(None) is None


def test_the_registry_loads_no_torch() -> None:
    code = "import sys, gblm_compress.layouts; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
