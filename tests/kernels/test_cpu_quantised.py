"""The kernels of quantised weights, every path forced, against plain loops over weights in float64."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gblm_compress.kernels import cpu, cpu_quantised
from gblm_compress.kernels.cpu_quantised import MOST_COLUMNS, Quantised
from gblm_compress.layouts import LAYOUTS
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
QUANTISED = [name for name in LAYOUTS if name.endswith(("int8", "int4"))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 5), (7, 64), (33, 100), (9, 128), (16, 576), (65, 130), (5, 1500), (4, 4500)]
TOKENS = (*range(1, 9), 9, 17, 100)


@cache
def packed(layout: str, rows: int, columns: int, group: int | None) -> tuple[Tensor, Quantised]:
    """A weight on a random grid, [rows, columns] in float64 by a plain loop, and the same as kernels read it."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    keep = torch.rand(rows, columns, generator=generator) < 0.5
    if LAYOUTS[layout].pattern:
        score = torch.rand(rows, columns, generator=generator)
        keep = Pattern("2:4").mask(score, score, 0.5)
    elif rows > 2:
        keep[1], keep[2] = False, True  # an empty and a full row
    count = 16 if layout.endswith("int4") else 255
    table = (torch.randperm(255, generator=generator)[:count] - 127).sort().values.to(torch.int8)
    scales = (torch.rand(rows, 1 if group is None else -(-columns // group), generator=generator) + 0.01).half() / 100
    codes = torch.randint(0, count, (rows, columns), generator=generator)
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            if keep[row, column] and scales[row].all():
                scale = scales[row, 0 if group is None else column // group]
                weight[row, column] = float(scale) * int(table[codes[row, column]])
    layer = LAYOUTS[layout].layer.from_dense(weight.float(), None, grid=Grid(scales, table, group))
    tensors = [layer.get_buffer(name) for name in (*layer.PACKED, *layer.DERIVED)]
    return weight, layer.kernel_weight(tensors, columns)


@pytest.mark.parametrize("layout", QUANTISED)
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("path", cpu.PATHS[:-1])
def test_products_and_rows(layout: str, group: int | None, path: str) -> None:
    if path not in cpu.paths(torch.int8):
        pytest.skip(f"this CPU has no {path} path")
    for rows, columns in SHAPES:
        columns += -columns % 4 if LAYOUTS[layout].pattern else 0
        weight, quantised = packed(layout, rows, columns, group)
        for dtype in DTYPES:
            out = torch.full((rows, columns), 7.0, dtype=dtype)
            assert torch.equal(cpu_quantised.restore(quantised, 0, out, path), weight.to(dtype))
            last = torch.full((1, columns), 7.0, dtype=dtype)
            assert torch.equal(cpu_quantised.restore(quantised, rows - 1, last, path), weight[-1:].to(dtype))
            for tokens in TOKENS if columns < 1000 else (1, 3, 9, 97):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                x[:, ::7] *= 30  # outliers
                got = cpu_quantised.linear(x, quantised, path)
                assert got.dtype == dtype
                expected = x.double() @ weight.T
                # half a step of x, sums in float32, and y once more
                step = x.double().abs().amax(1, keepdim=True) / 32767
                allowed = 0.51 * step * weight.abs().sum(1) + 2e-6 * (x.double().abs() @ weight.abs().T)
                allowed += torch.finfo(dtype).eps * expected.abs() + 1e-30
                assert ((got.double() - expected).abs() <= allowed).all(), (rows, columns, dtype, tokens)


@pytest.mark.parametrize("path", cpu.PATHS[:-1])
def test_what_is_no_ordinary_input(path: str) -> None:
    if path not in cpu.paths(torch.int8):
        pytest.skip(f"this CPU has no {path} path")
    weight, quantised = packed("bitmask-int8", 8, 100, None)
    x = torch.zeros(6, 100)
    x[1, 3], x[2, 5], x[3, 7], x[4, 9] = float("nan"), float("inf"), 1e30, 1e-38
    x[5] = torch.linspace(-1e-20, 1e-20, 100)
    y = cpu_quantised.linear(x, quantised, path)
    assert not y[0].any() and y[1:3].isnan().all() and not y[4].any()
    torch.testing.assert_close(y[[3, 5]], (x[[3, 5]].double() @ weight.T).float(), rtol=1e-3, atol=1e-24)


def largest(layout: str) -> tuple[Tensor, Quantised]:
    """As many columns as a kernel takes, all of the largest level."""
    table = torch.arange(112, 128, dtype=torch.int8) if layout.endswith("int4") else torch.arange(-127, 128).char()
    grid = Grid(torch.ones(1, 1).half(), table, None)
    weight = torch.full((1, MOST_COLUMNS), 127.0)
    if LAYOUTS[layout].pattern:
        weight[:, ::2] = 0.0
    layer = LAYOUTS[layout].layer.from_dense(weight, None, grid=grid)
    tensors = [layer.get_buffer(name) for name in (*layer.PACKED, *layer.DERIVED)]
    return layer.dense_weight(), layer.kernel_weight(tensors, MOST_COLUMNS)


@pytest.mark.parametrize("layout", QUANTISED)
@pytest.mark.parametrize("path", cpu.PATHS[:-1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_integer_overflows(layout: str, path: str, sign: float) -> None:
    if path not in cpu.paths(torch.int8):
        pytest.skip(f"this CPU has no {path} path")
    weight, quantised = largest(layout)
    y = cpu_quantised.linear(torch.full((1, MOST_COLUMNS), sign), quantised, path)
    assert float(y) == pytest.approx(sign * 127 * int(weight.count_nonzero()), rel=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    weight, quantised = packed("bitmask-int4", 33, 100, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 20):
            x = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(
                cpu_quantised.linear(x, quantised), (x.double() @ weight.T).float(), rtol=1e-3, atol=1e-3
            )
        out = torch.full((33, 100), 7.0)
        assert torch.equal(cpu_quantised.restore(quantised, 0, out), weight.float())
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    _, quantised = packed("bitmask-int8", 8, 100, None)
    unfit: list[Any] = [torch.ones(1, 101), torch.ones(1, 100, dtype=torch.float64), torch.ones(1, 100, device="meta")]
    for x in unfit:
        with pytest.raises(ValueError, match="the weight has 100"):
            cpu_quantised.linear(x, quantised)
    with pytest.raises(ValueError, match="no kernel amx"):
        cpu_quantised.linear(torch.ones(1, 100), quantised, "amx")
    for first, out in ((0, torch.ones(9, 100)), (-1, torch.ones(1, 100)), (0, torch.ones(1, 99))):
        with pytest.raises(ValueError, match="rows .* of 8 into"):
            cpu_quantised.restore(quantised, first, out)
