"""The compiled kernels, every path forced, against products in float64; and the threads that they borrow."""

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor

from gblm_compress.errors import UsageError
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import row_starts
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.quantisation import Grid
from tests.hostile_graphs import eight_bits, rounded
from tests.layouts.weights import sparse
from tests.scripts import python

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED = [name for name, layout in LAYOUTS.items() if layout.width]
SUM_TOLERANCE = 1e-5  # of Σ |x·w|: sums are float32, and products of 16 bit are exact there; y is rounded once more
SHAPES = [(1, 1), (3, 5), (7, 64), (33, 100), (65, 128), (16, 576), (5, 1500)]
MANY = (1, 9, 16, 20, 33, 70, 90, 127, 128, 129, 300)
MOST_COLUMNS = 1 << 16  # of a row of levels
OF_LEVELS = cpu.paths(torch.int8)


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def bitmask(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, cpu.Bitmask]:
    """A weight with half zeros, an empty and a full row, dense and as kernels read it."""
    weight = sparse("bitmask", rows, columns, dtype=dtype)
    weight[2:3] = 1
    held = LAYOUTS["bitmask"].kind.pack(weight)
    return weight, cpu.Bitmask(held["mask"], held["values"], row_starts(held["mask"]), columns)


@pytest.mark.parametrize(("dtype", "path"), [(dtype, path) for dtype in DTYPES for path in cpu.paths(dtype)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_and_rows(dtype: torch.dtype, path: str, threads: int, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    for rows, columns in SHAPES:
        weight, packed = bitmask(rows, columns, dtype)
        for tokens in (*range(1, cpu.FEW_TOKENS + 1), *(MANY if cpu.has_many(dtype, path) else ())):
            x = inputs(tokens, columns, dtype)
            got = packed.linear(x, path, many=tokens > cpu.FEW_TOKENS)
            assert got.dtype == dtype
            expected = x.double() @ weight.double().T
            scale = SUM_TOLERANCE * (x.double().abs() @ weight.double().abs().T)
            rounding = torch.finfo(dtype).eps * expected.abs()
            assert ((got.double() - expected).abs() <= scale + rounding + 1e-30).all(), (rows, columns, tokens)
        assert torch.equal(packed.expand(0, torch.full((rows, columns), 7.0, dtype=dtype), path), weight)
        assert torch.equal(packed.expand(rows - 1, torch.full((1, columns), 7.0, dtype=dtype), path), weight[-1:])


@cache
def levels(layout: str, rows: int, columns: int, group: int | None) -> tuple[Tensor, Any]:
    """A weight on a random grid as torch unpacks it, in float64, and the same as kernels read it."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = sparse(layout, rows, columns)
    weight[2:3] = 1
    count = 16 if layout.endswith("int4") else 255
    table = (torch.randperm(255, generator=generator)[:count] - 127).sort().values.to(torch.int8)
    scales = torch.rand(rows, 1 if group is None else -(-columns // group), generator=generator) + 0.01
    layer: Any = PackedLinear.from_dense(layout, weight, grid=Grid((scales / 40).half(), table, group))
    return layer.dense_weight().double(), layer._weight


@pytest.mark.parametrize("layout", QUANTISED)
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("path", OF_LEVELS)
def test_products_and_rows_of_levels(layout: str, group: int | None, path: str) -> None:
    for rows, columns in (*SHAPES, (9, 128), (65, 130), (4, 4500)):
        columns += -columns % 4 if LAYOUTS[layout].pattern else 0
        weight, of_levels = levels(layout, rows, columns, group)
        for dtype in DTYPES:
            quantised = replace(of_levels, dtype=dtype)
            out = torch.full((rows, columns), 7.0, dtype=dtype)
            assert torch.equal(quantised.expand(0, out, path), weight.to(dtype))
            last = torch.full((1, columns), 7.0, dtype=dtype)
            assert torch.equal(quantised.expand(rows - 1, last, path), weight[-1:].to(dtype))
            for tokens in (*range(1, 9), 9, 17, 100) if columns < 1000 else (1, 3, 9, 97):
                x = inputs(tokens, columns, dtype)
                x[:, ::7] *= 30  # outliers
                got = quantised.linear(x, path)
                assert got.dtype == dtype
                expected = torch.tensor(rounded(x.float().numpy(), eight_bits(tokens, path))) @ weight.T
                # inputs half way between two steps of 16 bits may go either way; sums in float32, and y once more
                half_way = 0.01 * weight.abs().sum(1) + 2 * weight.abs().amax(1)
                allowed = half_way * x.double().abs().amax(1, keepdim=True) / 32767
                allowed += 2e-6 * (x.double().abs() @ weight.abs().T)
                allowed += torch.finfo(dtype).eps * expected.abs() + 1e-30
                assert ((got.double() - expected).abs() <= allowed).all(), (rows, columns, dtype, tokens)


@pytest.mark.parametrize("path", OF_LEVELS)
@pytest.mark.parametrize("tokens", [6, 13])
def test_inputs_that_are_no_ordinary_numbers(tokens: int, path: str) -> None:
    weight, quantised = levels("bitmask-int8", 8, 100, None)
    x = torch.zeros(tokens, 100)
    x[1, 3], x[2, 5], x[3, 7], x[4, 9] = float("nan"), float("inf"), 1e30, 1e-38
    x[5] = torch.linspace(-1e-20, 1e-20, 100)
    y = quantised.linear(x, path)
    assert not y[0].any() and y[1:3].isnan().all() and not y[4].any() and not y[6:].any()
    expected = torch.tensor(rounded(x[[3, 5]].numpy(), eight_bits(tokens, path))) @ weight.T
    torch.testing.assert_close(y[[3, 5]], expected.float(), rtol=1e-3, atol=1e-24)


@pytest.mark.parametrize("layout", QUANTISED)
def test_no_integer_overflows(layout: str) -> None:
    """As many columns as a kernel takes, all of the largest level."""
    table = torch.arange(112, 128, dtype=torch.int8) if layout.endswith("int4") else torch.arange(-127, 128).char()
    weight = torch.full((1, MOST_COLUMNS), 127.0)
    if LAYOUTS[layout].pattern:
        weight[:, ::2] = 0.0
    layer: Any = PackedLinear.from_dense(layout, weight, grid=Grid(torch.ones(1, 1).half(), table, None))
    expected = 127 * int(layer.dense_weight().count_nonzero())
    for path in OF_LEVELS:
        for sign in (-1.0, 1.0):
            for tokens in (1, 9):
                y = layer._weight.linear(torch.full((tokens, MOST_COLUMNS), sign), path)
                assert y.flatten().tolist() == pytest.approx([sign * expected] * tokens, rel=1e-5)


@pytest.mark.parametrize("packed", [bitmask(8, 100, torch.float32)[1], levels("bitmask-int8", 8, 100, None)[1]])
def test_a_path_that_the_cpu_lacks_is_refused(packed: Any) -> None:
    with pytest.raises(ValueError, match="no kernel neon"):
        packed.linear(torch.ones(1, 100), "neon")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_threads_are_those_of_torchs_openmp(tmp_path) -> None:
    """It is found beside a mapped file whose name is no Unicode, too."""
    (tmp_path / os.fsdecode(b"a caf\xe9")).write_bytes(bytes(4096))
    with (tmp_path / os.fsdecode(b"a caf\xe9")).open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
        assert all(cpu._openmp_of_torch())


RUNTIME = """
typedef void work(void *);
void GOMP_parallel(work *function, void *data, unsigned threads, unsigned flags) { function(data); }
int omp_get_thread_num(void) { return 0; }
int omp_get_num_threads(void) { return 1; }
"""


@pytest.mark.skipif(sys.platform != "linux" or which("cc") is None, reason="needs LD_PRELOAD and a C compiler")
def test_a_runtime_that_is_preloaded_takes_the_place_of_torchs_own(tmp_path: Path) -> None:
    """As vLLM preloads Intel's: torch's loops run on it, and kernels must not start threads beside them."""
    library = tmp_path / "preloaded.so"
    (tmp_path / "runtime.c").write_text(RUNTIME)
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "runtime.c"), "-o", str(library)], check=True)
    code = (
        "import ctypes, torch; from gblm_compress.kernels import cpu; "
        f"preloaded = ctypes.CDLL({str(library)!r}).GOMP_parallel; "
        "assert ctypes.cast(preloaded, ctypes.c_void_p).value == cpu._openmp_of_torch()[0]"
    )
    python("-c", code, LD_PRELOAD=str(library))


PRODUCTS = """
from concurrent.futures import ThreadPoolExecutor
import torch
from gblm_compress.kernels import cpu
from gblm_compress.layouts.packed_linear import PackedLinear

torch.set_num_threads(4)
weight = (torch.randn(65, 200) * (torch.rand(65, 200) < 0.5)).add(0.0)
packed = PackedLinear.from_dense("bitmask", weight)._weight
levels = PackedLinear.from_dense("bitmask-int4", weight)


def products():
    for tokens in (1, 5, 33):
        x = torch.randint(-127, 128, (tokens, 200)) / 128
        x[:, ::32] = 127 / 128  # so that 8 bits with a scale for 32 columns hold all inputs
        wrong = (levels._weight.linear(x) - x @ levels.dense_weight().T).abs().max()
        assert wrong < 1e-2, (tokens, wrong)
        for path in cpu.paths(torch.float32):
            if tokens <= cpu.FEW_TOKENS or cpu.has_many(torch.float32, path):
                torch.full((1 << 12,), 1e9)  # what a result that is not written would hold
                y = packed.linear(x, path, many=tokens > cpu.FEW_TOKENS)
                wrong = (y - x @ weight.T).abs().max()
                assert wrong < 1e-3, (tokens, path, wrong)
            assert torch.equal(packed.expand(0, torch.full((65, 200), 7.0), path), weight)
    assert torch.equal(levels._weight.expand(0, torch.full((65, 200), 7.0)), levels.dense_weight())


products()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: products(), range(40)))
"""
TEAMS = [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}, {}]


@pytest.mark.parametrize("environment", TEAMS, ids=str)
def test_any_team_of_threads_computes_all_rows(environment: dict[str, str]) -> None:
    """For several threads of Python at once, too."""
    python("-c", PRODUCTS, **environment)


def test_a_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.PATH_VARIABLE, "portable")
    assert cpu.path.__wrapped__(torch.float32) == "portable"
    monkeypatch.setenv(cpu.PATH_VARIABLE, "no path")
    with pytest.raises(UsageError, match="has no such path .* it has portable"):
        cpu.path.__wrapped__(torch.float32)


@pytest.mark.parametrize(
    ("kernel", "processors", "spreads"),
    [
        ("portable", 2, False),
        ("avx2", 8, True),
        ("avx2", 9, False),
        ("avx-vnni", 8, True),
        ("vnni", 8, True),
        ("avx512", 2, False),
    ],
)
def test_places_are_spread_without_vbmi2_on_few_processors(monkeypatch, kernel, processors, spreads) -> None:
    if kernel not in cpu.paths(torch.int8):
        pytest.skip(f"this CPU cannot run {kernel}")
    monkeypatch.setenv(cpu.PATH_VARIABLE, kernel)
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    assert cpu.spreads_places() is spreads
