"""Every path of the compiled kernels against a product in float64, forced one by one."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch

from gblm_compress.errors import UsageError
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import row_starts
from gblm_compress.layouts.bitmask import pack
from gblm_compress.layouts.bitmask_cpu import linear_by_tiles

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SUM_TOLERANCE = 1e-5  # of Σ |x·w|: sums are float32, and products of 16 bit are exact there; y is rounded once more
SHAPES = [(1, 1), (3, 5), (7, 64), (33, 100), (65, 128), (16, 576), (5, 1500)]
MANY = (1, 9, 16, 33, 70, 90, 127, 128, 129, 300)


def weight_of(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    if rows > 2:
        weight[1], weight[2] = 0, 1  # an empty and a full row
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", cpu.PATHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_and_expand(dtype: torch.dtype, path: str, threads: int) -> None:
    if path not in cpu.paths(dtype):
        pytest.skip(f"this CPU has no {path} path for {dtype}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns in SHAPES:
            weight = weight_of(rows, columns, dtype)
            mask, values = pack(weight)
            starts = row_starts(mask)
            many = MANY if cpu.has_many(dtype, path) else ()
            for tokens in (*range(1, cpu.FEW_TOKENS + 1), *many):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                got = cpu.linear(x, mask, values, starts, path, many=tokens > cpu.FEW_TOKENS)
                assert got.dtype == dtype
                expected = x.double() @ weight.double().T
                scale = SUM_TOLERANCE * (x.double().abs() @ weight.double().abs().T)
                rounding = torch.finfo(dtype).eps * expected.abs()
                assert ((got.double() - expected).abs() <= scale + rounding + 1e-30).all(), (rows, columns, tokens)
            out = torch.full((rows, columns), 7.0, dtype=dtype)
            assert torch.equal(cpu.expand(mask, values, starts, columns, 0, out, path), weight)
            part = torch.full((1, columns), 7.0, dtype=dtype)
            assert torch.equal(cpu.expand(mask, values, starts, columns, rows - 1, part, path), weight[-1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_the_dense_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gblm_compress.layouts.bitmask_cpu.TILE_BYTES", 20_000)  # several tiles, the last one ragged
    weight = weight_of(65, 128, dtype)
    mask, values = pack(weight)
    x = torch.randn(19, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(linear_by_tiles(x, mask, values, row_starts(mask)), x @ weight.T)


def test_threads_are_torchs_own() -> None:
    """No second OpenMP runtime: the entry points come from the one that torch loaded."""
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
        "import ctypes, torch; from gblm_compress.kernels import cpu; own = ctypes.CDLL(None); "
        f"given = ctypes.CDLL({str(library)!r}); "
        "address = lambda library: ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value; "
        "assert address(own) == address(given) == cpu._openmp_of_torch()[0]"
    )
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PRODUCTS = """
import threading
import torch
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import row_starts
from gblm_compress.layouts.bitmask import pack

torch.set_num_threads(4)
weight = torch.randn(65, 200) * (torch.rand(65, 200) < 0.5)
mask, values = pack(weight.add(0.0))
starts = row_starts(mask)


def products():
    for tokens in (1, 5, 33):
        for path in cpu.paths(torch.float32):
            if tokens <= cpu.FEW_TOKENS or cpu.has_many(torch.float32, path):
                x = torch.randn(tokens, 200)
                torch.full((1 << 12,), 1e9)  # what a result that is not written would hold
                y = cpu.linear(x, mask, values, starts, path, many=tokens > cpu.FEW_TOKENS)
                wrong = (y - x @ weight.T).abs().max()
                assert wrong < 1e-3, (tokens, path, wrong)
            assert torch.equal(cpu.expand(mask, values, starts, 200, 0, torch.full((65, 200), 7.0), path), weight)
"""


@pytest.mark.parametrize(
    "environment",
    [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}],
    ids=str,
)
def test_whatever_team_openmp_gives_computes_all_rows(environment) -> None:
    code = PRODUCTS + "products()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_several_threads_of_python_at_once() -> None:
    code = (
        PRODUCTS
        + """
failed = []
threading.excepthook = failed.append
callers = [threading.Thread(target=lambda: [products() for _ in range(20)]) for _ in range(4)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
assert not failed, failed
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.path.cache_clear()
    try:
        monkeypatch.setenv(cpu.PATH_VARIABLE, "portable")
        assert cpu.path(torch.float32) == "portable"
        cpu.path.cache_clear()
        monkeypatch.setenv(cpu.PATH_VARIABLE, "neon")
        with pytest.raises(UsageError, match="has no such path .* it has portable"):
            cpu.path(torch.float32)
    finally:
        cpu.path.cache_clear()


def test_importing_torch_after_the_library_is_harmless() -> None:
    code = "from gblm_compress.kernels import cpu; assert cpu.available(); import torch; torch.ones(3)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
