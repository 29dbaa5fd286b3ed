"""Which product runs on a CPU for how many tokens, and how that is measured and kept."""

from typing import Any

import pytest
import torch

from gblm_compress import machine
from gblm_compress.kernels import cpu
from gblm_compress.layouts import cpu_linear
from gblm_compress.layouts.packed_linear import DERIVED, OPERATOR, UNPACKED, PackedLinear
from tests.layouts.weights import sparse

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")


def layer(layout: str = "bitmask", dtype: torch.dtype = torch.float32, rows: int = 48) -> PackedLinear:
    return PackedLinear.from_dense(layout, sparse(layout, rows, 100, dtype=dtype))


def test_it_says_which_kernel_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "crossover", lambda *_: 4)
    path, packed = cpu.paths(torch.float32)[-1], layer()
    assert packed.kernel(1) == f"bitmask {path}"
    many = f"bitmask {path}, many tokens" if cpu.has_many(torch.float32, path) else "expanded tiles and dense GEMM"
    assert packed.kernel(5) == many
    levels = layer("bitmask-int8")
    assert levels.kernel(4) == f"bitmask-int8 {cpu.paths(torch.int8)[-1]}"
    assert levels.kernel(5) == "expanded tiles and dense GEMM"
    assert layer("sparse24").kernel(1) == UNPACKED  # a layout without kernels for a CPU
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert layer().kernel(1) == UNPACKED


@pytest.mark.parametrize("layout", ["bitmask", "bitmask-int8", "bitmask-int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tiles_are_the_dense_product(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "TILE_BYTES", 7_000)  # several tiles, the last one ragged
    packed: Any = layer(layout, dtype)
    x = torch.randn(19, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(cpu_linear.linear_by_tiles(x, packed._weight), x @ packed.dense_weight().T)


def test_the_crossover_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(cpu_linear, "measure_crossover", lambda *_: measured.append(1) or 5)
    for _ in range(2):
        assert layer(rows=47).crossover == 5
        machine.recorded.cache_clear()  # as in a new process
    assert len(measured) == 1
    monkeypatch.setattr(cpu_linear, "measure_crossover", lambda *_: 256)
    assert layer("bitmask-int8", rows=47).crossover == cpu_linear.EVERY


@pytest.mark.parametrize("remembered", [40, 0, -1, 2.0, True, None, "5", [5]], ids=repr)
def test_a_crossover_that_cannot_be_is_measured_again(remembered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens would be written beyond the sums of 8."""
    shape = f"crossover bitmask 48x100 torch.float32 {torch.get_num_threads()} {cpu.path(torch.float32)}"
    monkeypatch.setattr(cpu_linear, "measure_crossover", lambda *_: 5)
    monkeypatch.setattr(machine, "recorded", lambda path, machine: {shape: remembered})
    assert layer().crossover == 5


def test_the_kernel_for_few_tokens_takes_no_more() -> None:
    packed: Any = layer()
    tensors = [packed.get_buffer(name) for name in (*packed.kind.names, *DERIVED)]
    with pytest.raises(ValueError, match="for 9 tokens"):
        OPERATOR(torch.ones(9, 100), tensors, None, "bitmask", [48, 100], 40, "")
    with pytest.raises(ValueError, match="for 9 tokens"):
        packed._weight.linear(torch.ones(9, 100))
    with pytest.raises(ValueError, match=r"no kernel portable for 9 tokens .*many=True"):
        packed._weight.linear(torch.ones(9, 100), "portable", many=True)
