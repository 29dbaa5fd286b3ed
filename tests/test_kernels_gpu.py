"""The Triton kernel under its interpreter, against a product in float64: shapes, ragged edges, splits, tokens."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")

# In a process of its own: the interpreter is chosen by an environment variable when triton is imported.
CHECK = """
import sys, torch
from gblm_compress.bitmask import pack, row_starts
from gblm_compress.kernels import gpu
gpu.ENOUGH_PROGRAMS = int(sys.argv[1])
splits = set()
for dtype in (torch.float16, torch.bfloat16):
    for rows, columns in ((1, 1), (3, 64), (5, 100), (4, 512), (7, 1111), (2, 2048)):
        generator = torch.Generator().manual_seed(rows * columns)
        weight = torch.randn(rows, columns, generator=generator)
        weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
        if rows > 2:
            weight[1], weight[2] = 0, 1
        weight = weight.to(dtype)
        mask, values = pack(weight)
        shares = gpu.split_starts(mask, row_starts(mask), columns)
        splits.add(shares.shape[1])
        for tokens in (1, 2, 3, 8, 16):
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            got = gpu.linear(x, mask, values, shares).double()
            expected = x.double() @ weight.double().T
            scale = x.double().abs() @ weight.double().abs().T
            assert got.shape == expected.shape
            assert ((got - expected).abs() <= 1e-5 * scale + 1e-30).all(), (dtype, rows, columns, tokens)
print(sorted(splits))
"""


@pytest.mark.parametrize(("programs", "splits"), [(1, "[1]"), (24, "[1, 3, 4]")])
def test_against_the_dense_product(programs: int, splits: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(programs)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == splits
