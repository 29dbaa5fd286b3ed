"""The Triton kernels under their interpreter, against a product in float64: shapes, ragged edges, tilings, tokens.

And compiled for a GPU that need not be there, which finds what the interpreter does not: that a tiling fits.
"""

from collections import defaultdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from gblm_compress.layouts import LAYOUTS
from tests.layouts.weights import EXACT, packed, sparse
from tests.scripts import python

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
    python("-c", CHECK, layout, TRITON_INTERPRET="1")


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
POINTERS |= {torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32"}


@pytest.fixture
def compiled(tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that `gpu` starts are compiled for compute capability 9.0 instead; these are their binaries."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gblm_compress.kernels import gpu, gpu_programs

    made: list[Any] = []

    def compile(kernel, *given, num_warps=4, enable_fp_fusion, **constants) -> None:
        names = kernel.arg_names
        types = ["i32" if isinstance(each, int) else POINTERS[each.dtype] for each in given]
        signature = dict.fromkeys(constants, "constexpr") | dict(zip(names, types, strict=False))
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        made.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("linear", "add_up", "expand"):
        kernel = getattr(gpu_programs, name)
        monkeypatch.setattr(gpu.gpu_programs, name, defaultdict(lambda kernel=kernel: partial(compile, kernel)))
    return made


@pytest.mark.parametrize(
    ("layout", "dtype", "tokens"),
    [*((layout, torch.bfloat16, 1) for layout in LAYOUTS), *((layout, torch.float16, 64) for layout in EXACT)],
)
def test_every_kernel_compiles_for_an_h100(compiled, layout: str, dtype: torch.dtype, tokens: int) -> None:
    from gblm_compress.kernels import gpu

    width = LAYOUTS[layout].width
    weight = packed(layout, sparse(layout, 128, 4096, dtype=dtype), **({"group": 64} if width else {})).for_gpu()
    gpu.expand(weight)
    x, bias = torch.empty(tokens, 4096, dtype=dtype), torch.empty(128, dtype=dtype)
    for tiling in gpu.tilings(weight.stored, tokens)[:: 4 if width else 1]:  # one of each kind
        del compiled[1:]
        gpu.linear(x, weight, bias, gpu.Tiling._make(map(int, tiling)))  # as a plan has it
        assert all(binary.asm["cubin"] for binary in compiled)
        assert len(compiled) == (2 if tiling.programs == 1 else 3)  # with the one that adds up
        assert compiled[1].metadata.shared <= 227 << 10
        assert ("mma" in compiled[1].asm["ptx"]) == tiling.tensor_cores
