"""Dispatch on CUDA, without a GPU: kernels and clock are replaced, what is chosen and passed on is not."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from gblm_compress import machine
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import DERIVED, UNPACKED, PackedLinear, on_cuda
from gblm_compress.machine import CACHE_VARIABLE
from tests.layouts.weights import packed, sparse

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")

if find_spec("triton"):
    from gblm_compress.kernels import gpu
    from gblm_compress.kernels.gpu import Packed
    from gblm_compress.layouts import cuda_linear
    from gblm_compress.layouts.cuda_linear import DENSE, TOKENS, Candidate

WITH_KERNELS = pytest.mark.parametrize("layout", [name for name, entry in LAYOUTS.items() if "cuda" in entry.kernels])
ALGORITHM = 7  # of cuSPARSELt


def two_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return sparse("sparse24", rows, columns, dtype=dtype)


def as_kernels_read_it(rows: int, columns: int, layout: str = "sparse24") -> "Packed":
    return packed(layout, two_four(rows, columns)).for_gpu()


def dense_of(weight: "Packed") -> Tensor:
    kind = LAYOUTS[weight.layout].kind
    held = {"scales": weight.scales, "levels": weight.levels, "values": weight.values, kind.mask.name: weight.places}
    return kind.unpack(held, weight.shape[1], weight.dtype)


def product_on_cuda(layer: PackedLinear, x: Tensor) -> Tensor:
    """What the operator computes for tensors on CUDA, called with tensors that are not."""
    tensors = [layer.get_buffer(name) for name in (*layer.kind.names, *DERIVED)]
    return on_cuda(x, tensors, layer.bias, layer.layout, list(layer.shape), layer.crossover, layer.plan)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that compute on the CPU what those of the GPU would; the names of those called."""
    called: list[str] = []

    def linear(x, weight, bias, tiling):
        called.append("triton")
        assert tiling in gpu.tilings(weight.stored, len(x))
        return torch.nn.functional.linear(x, dense_of(weight), bias)

    def expand(weight):
        called.append("expand")
        return dense_of(weight)

    def cusparselt(operand, inputs, bias=None, transpose_result=False, alg_id=0):
        called.append("cusparselt")
        assert alg_id == ALGORITHM and transpose_result and inputs.shape[1] % 8 == 0
        return torch.nn.functional.linear(inputs.T, operand, bias)

    monkeypatch.setattr(gpu, "linear", linear)
    monkeypatch.setattr(gpu, "expand", expand)
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cusparselt)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *_, **__: ALGORITHM)
    monkeypatch.setattr(
        cuda_linear.SparseSemiStructuredTensorCUSPARSELT, "_validate_device_dim_dtype_shape", lambda dense: None
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return called


def timed(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> None:
    """A clock that gives each kernel its time; Triton's tilings are slower one after the other."""

    def milliseconds(call) -> float:
        candidate = call.args[0]
        tilings = gpu.TILINGS[call.args[2].stored]
        order = tilings.index(gpu.Tiling(*candidate.variant)) if candidate.kernel == "triton" else 0
        return times[candidate.kernel] + order / 1000

    monkeypatch.setattr(cuda_linear, "milliseconds", milliseconds)


def test_the_fastest_runs_and_a_copy_must_be_worth_it() -> None:
    cslt = Candidate("cusparselt", (1,))
    assert cuda_linear.fastest({DENSE: 2.0, cslt: 1.0}) == cslt
    assert cuda_linear.fastest({DENSE: 1.0, cslt: 0.95}) == DENSE


def test_a_plan_is_measured_written_and_read(calls, monkeypatch) -> None:
    timed(monkeypatch, {"dense": 0.5, "triton": 0.1, "cusparselt": 0.3})
    plan = cuda_linear._measured_plan(as_kernels_read_it(64, 64))
    one, many = (Candidate("triton", tuple(map(int, gpu.tilings("two of four", tokens)[0]))) for tokens in (1, 64))
    large = Candidate("cusparselt", (ALGORITHM,))
    expected = {1: one, 2: one, 3: many, 64: many, 65: large, 4096: large, 100_000: large}
    assert {tokens: cuda_linear.choose(plan, tokens) for tokens in expected} == expected
    assert " ".join(map(str, cuda_linear.candidates(plan))) == plan
    assert cuda_linear.choose("", 5) == DENSE


def test_a_plan_that_cannot_be_is_measured_again(calls, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    timed(monkeypatch, {"dense": 0.5, "triton": 0.1, "cusparselt": 0.3})
    weight = as_kernels_read_it(64, 64)
    good = cuda_linear._measured_plan(weight)
    assert cuda_linear.is_plan(good, weight) and "cusparselt" in good
    assert not cuda_linear.is_plan(good, as_kernels_read_it(64, 64, "bitmask"))
    first, *rest = good.split()
    damaged: list[Any] = [None, 13, "", " ".join(rest)]
    damaged += [" ".join([word, *rest]) for word in ("cusparselt:7", "triton", "triton:3,1024,4,0,1")]
    for many in ("cusparselt", "cusparselt:-1", "cusparselt:x", "dense:1", "fastest", first):
        damaged.append(" ".join([first, *rest[:-1], many]))
    all_dense = " ".join(["dense"] * len(TOKENS))
    for plan in (all_dense, *damaged):
        recorded = {"cuda sparse24 64x64 torch.bfloat16": plan}
        monkeypatch.setattr(machine, "recorded", lambda path, machine, recorded=recorded: recorded)
        assert cuda_linear.plan(weight) == (plan if plan == all_dense else good)


def test_what_does_not_run_or_agree_is_excluded_with_its_reason(calls, monkeypatch) -> None:
    timed(monkeypatch, {"dense": 0.5, "triton": 0.1, "cusparselt": 0.3})
    weight = as_kernels_read_it(16, 64)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *_, **__: torch.ones(64, 16).to(torch.bfloat16))
    with pytest.warns(UserWarning, match="cusparselt:7 computes another product on this GPU"):
        times, excluded = cuda_linear.measure(weight, 64)
    assert {candidate.kernel for candidate in times} == {"dense", "triton"}
    assert excluded == {"cusparselt:7": "another product"}

    def fails(*_) -> None:
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(gpu, "linear", fails)
    times, excluded = cuda_linear.measure(as_kernels_read_it(16, 64, "bitmask"), 1)
    assert list(times) == [DENSE]
    assert set(excluded.values()) == {"ValueError: out of resource: shared memory"}


@WITH_KERNELS
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_runs_its_plan_and_says_so(calls, monkeypatch, layout: str, bias: bool) -> None:
    timed(monkeypatch, {"dense": 0.3, "triton": 0.1, "cusparselt": 0.2})
    monkeypatch.setattr(PackedLinear, "cuda_kernels", lambda layer: cuda_linear)
    monkeypatch.setattr(cpu, "available", lambda: False)  # a GPU's layer is what is tested
    weight = packed(layout, two_four(64, 64)).dense_weight()  # the points that it is rounded to are held bit for bit
    given = torch.randn(64).to(torch.bfloat16) if bias else None
    layer = PackedLinear.from_dense(layout, weight, given)
    many = "cuSPARSELt" if layout == "sparse24" else UNPACKED
    assert [layer.kernel(tokens) for tokens in (1, 64, 65)] == [f"{layout} Triton", f"{layout} Triton", many]
    needs_more = layer.kind.mask.name == "mask" or layout == "sparse24"
    assert (sum(buffer.nbytes for buffer in layer.buffers()) > layer.packed_bytes) == needs_more
    large = "cusparselt" if layout == "sparse24" else "expand"
    for shape, kernel in [((64,), "triton"), ((2, 8, 64), "triton"), ((70, 64), large), ((0, 64), None)]:
        calls.clear()
        x = torch.randn(shape).to(torch.bfloat16)
        torch.testing.assert_close(product_on_cuda(layer, x), torch.nn.functional.linear(x, weight, given))
        assert calls == ([kernel] if kernel else [])


def test_a_plan_from_elsewhere_whose_copy_was_not_prepared_is_refused(calls) -> None:
    """As a compiled graph that is kept on disk has it, after the kernels were measured anew."""
    layer = PackedLinear.from_dense("sparse24", two_four(64, 64))
    layer.plan = " ".join(["cusparselt:7"] * len(TOKENS))
    with pytest.raises(RuntimeError, match="cusparselt:7 is not prepared: a compiled graph has an older plan"):
        product_on_cuda(layer, torch.randn(8, 64).to(torch.bfloat16))
    assert not calls


@WITH_KERNELS
def test_without_a_plan_the_weight_is_unpacked(layout: str) -> None:
    weight = packed(layout, two_four(8, 64, torch.float32)).dense_weight()
    layer = PackedLinear.from_dense(layout, weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(product_on_cuda(layer, x), x @ weight.T)
