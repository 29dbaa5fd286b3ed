"""The Triton kernels under their interpreter, against a product in float64: shapes, ragged edges, tilings, tokens.

And compiled for a GPU that need not be there, which finds what the interpreter does not: that a tiling fits.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from gblm_compress.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")

# In a process of its own: the interpreter is chosen by an environment variable when triton is imported.
CHECK = """
import itertools, sys, torch
import tests.triton_interpreter
from gblm_compress.kernels import gpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.quantisation import Grid
from tests.layouts.weights import sparse

layout = sys.argv[1]
kind = LAYOUTS[layout].kind
grouped = bool(kind.width)
ragged = (9, 300) if LAYOUTS[layout].pattern else (9, 301)


def on_a_grid(weight, group):
    table = torch.arange(-127, 128) if kind.width == 8 else torch.arange(-45, 50, 6)  # none is zero
    scales = torch.rand(len(weight), 1 if group is None else -(-weight.shape[1] // group), generator=generator)
    held = kind.pack(weight, grid=Grid((scales / 40 + 0.01).half(), table.char(), group))
    if kind.width == 4 and len(weight) > 5:  # a table for each row, as of stacked layers
        held["levels"] = held["levels"] + torch.arange(len(weight)).char()[:, None]
    return held


sizes = (2, 4), (5, 64), ragged, (19, 1032)
for dtype, (rows, columns) in itertools.product((torch.float16, torch.bfloat16), sizes):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = sparse(layout, rows, columns, dtype=dtype)
    if not LAYOUTS[layout].pattern:
        weight[2:3] = 1
    bias = torch.randn(rows, generator=generator).to(dtype)
    held = on_a_grid(weight, {5: 32, 19: 64, 2: 128}.get(rows)) if grouped else kind.pack(weight)
    layer = PackedLinear.holding(layout, (rows, columns), held, dtype)
    weight, packed = layer.dense_weight(), layer.for_gpu()
    assert same_bits(gpu.expand(packed), weight)
    for tokens in (1, 33) if rows > 10 else (1, 16) if grouped else (1, 2, 16):
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        for given in (None, bias) if rows == 9 else (bias,):
            expected = x.double() @ weight.double().T + (0 if given is None else given.double())
            # sums are float32; y is rounded once
            error = 1e-5 * (x.double().abs() @ weight.double().abs().T) + torch.finfo(dtype).eps * expected.abs()
            for tiling in gpu.tilings(kind.mask.stored, tokens)[:: 2 if grouped else 1]:  # 16 bits have them too
                got = gpu.linear(x, packed, given, tiling)
                assert got.shape == expected.shape and got.dtype == dtype
                wrong = ((got.double() - expected).abs() > error + 1e-30).sum()
                assert not wrong, (dtype, rows, columns, tokens, tiling)
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_dense_product(layout: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, layout],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """compiled(kernel, types, constants, warps): the kernel compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gblm_compress.kernels import gpu

    def compile(kernel, types, constants, warps):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **gpu.OPTIONS})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield compile


def _types(layout: str, element: str, result: str) -> dict[str, str]:
    stored, width = LAYOUTS[layout].kind.mask.stored, LAYOUTS[layout].width or 16
    values = {
        "mask": {16: f"*{element}", 8: "*i8", 4: "*u8"},
        "two of four": {16: "*i32", 8: "*i16", 4: "*u8"},
        "all": {8: "*i8"},
    }[stored][width]
    types = {"x": f"*{element}", "bias": f"*{element}", "y": f"*{result}", "dense": f"*{element}"}
    types |= {"values": values, "places": {"mask": "*i32", "two of four": "*u8", "all": "*i8"}[stored]}
    types["starts"] = "*i32" if stored == "mask" else values
    return types | {"scales": values if width == 16 else "*fp16", "levels": "*i8" if width == 4 else values}


def _constants(layout: str) -> dict[str, object]:
    stored, width = LAYOUTS[layout].kind.mask.stored, LAYOUTS[layout].width or 16
    return {"STORED": stored, "WIDTH": width, "GROUP": 0 if width == 16 else 64}


@pytest.mark.parametrize(
    ("layout", "element", "tokens"),
    [*((layout, "bf16", 1) for layout in LAYOUTS), ("bitmask", "fp16", 64), ("sparse24", "fp16", 64)],
)
def test_every_tiling_compiles_for_an_h100(compiled, layout: str, element: str, tokens: int) -> None:
    from gblm_compress.kernels import gpu, gpu_programs

    tilings = gpu.tilings(LAYOUTS[layout].kind.mask.stored, tokens)
    for tiling in tilings[:: 4 if LAYOUTS[layout].width else 1]:  # one of each kind
        constants = _constants(layout) | {
            "TENSOR_CORES": tiling.tensor_cores,
            "BIAS": tiling.programs == 1,
            "TOKENS": max(tokens, 16) if tiling.tensor_cores else tokens,
            "ROWS": tiling.rows,
            "COLUMNS": tiling.columns,
        }
        types = _types(layout, element, element if tiling.programs == 1 else "fp32")
        binary = compiled(gpu_programs.linear, types, constants, tiling.warps)
        assert binary.asm["cubin"] and binary.metadata.shared <= 227 << 10
        assert ("mma" in binary.asm["ptx"]) == tiling.tensor_cores


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_unpacking_kernel_compiles_for_an_h100(compiled, layout: str) -> None:
    from gblm_compress.kernels import gpu, gpu_programs

    constants = _constants(layout) | {"ROWS": 8, "COLUMNS": gpu.GRAIN}
    assert compiled(gpu_programs.expand, _types(layout, "bf16", "bf16"), constants, 4).asm["cubin"]


def test_the_kernel_that_adds_up_compiles_for_an_h100(compiled) -> None:
    from gblm_compress.kernels import gpu, gpu_programs

    sums = {"partial": "*fp32", "bias": "*fp16", "y": "*fp16"}
    assert compiled(gpu_programs.add_up, sums, {"BIAS": True, "SPLITS": 4, "BLOCK": gpu.SUMMED_AT_ONCE}, 4).asm["cubin"]
