"""Products with packed weights on CUDA. The fastest kernel for each number of tokens is measured for each shape.

Candidates are the Triton kernels that read packed bytes (up to 64 tokens, in several tilings), cuSPARSELt for 2:4,
and the dense product of the unpacked weight. Each is timed with a flushed L2 cache, for powers of two of tokens. The
fastest ones are the plan of a shape, which is kept in the cache folder.
"""

import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from gblm_compress.errors import first_line
from gblm_compress.kernels import gpu
from gblm_compress.kernels.gpu import Packed, Tiling
from gblm_compress.machine import remembered
from gblm_compress.progress import Progress

TOKENS = tuple(2**power for power in range(13))  # 1 … 4096; a plan has a word for each
FEWEST_FOR_CUSPARSELT = 8  # tokens; fewer would be padded to that
# cuSPARSELt reads a copy of the weight in its own format; its speed must be worth those bytes.
WORTH_A_COPY = 1.1
AGREEMENT = 0.02  # largest difference from the dense product, as a fraction of its largest value
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
REPEATS, WARM_UP = 9, 2
_HEAD_START = 10_000_000  # clock cycles that the device waits while the host queues a batch of calls


class Candidate(NamedTuple):
    kernel: str  # "triton", "cusparselt" or "dense"
    variant: tuple[int, ...] = ()  # the fields of a `Tiling`, or the number of a cuSPARSELt algorithm

    def __str__(self) -> str:
        return ":".join((self.kernel, ",".join(str(int(part)) for part in self.variant))).rstrip(":")


DENSE = Candidate("dense")


def plan(weight: Packed) -> str:
    """The fastest candidate for each of `TOKENS`, separated by spaces; measured once for a shape, dtype and machine."""
    rows, columns = weight.shape
    device = weight.values.device
    machine = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    grouped = f"/{weight.group}" if weight.scales is not None else ""
    what = f"cuda {weight.layout} {rows}x{columns}{grouped} {weight.dtype}"
    return remembered(machine, what, lambda: _measured_plan(weight), lambda words: is_plan(words, weight))


def is_plan(words: Any, weight: Packed) -> bool:
    """Whether these words have, for each of `TOKENS`, a candidate that can run for that weight."""
    chosen = words.split() if isinstance(words, str) else []
    return len(chosen) == len(TOKENS) and all(map(partial(_could_run, weight), chosen, TOKENS))


def _could_run(weight: Packed, word: str, tokens: int) -> bool:
    possible = [str(candidate) for candidate in _possible(weight, tokens)]
    if word.startswith("cusparselt"):
        return "cusparselt" in possible and re.fullmatch(r"cusparselt:\d{1,3}", word) is not None
    return word in possible


def _possible(weight: Packed, tokens: int) -> list[Candidate]:
    """The candidates for a weight of that layout; the algorithm of cuSPARSELt is searched later."""
    tilings = gpu.tilings(weight.stored, tokens)
    found = [DENSE, *(Candidate("triton", tuple(map(int, tiling))) for tiling in tilings)]
    if weight.stored == "two of four" and tokens >= FEWEST_FOR_CUSPARSELT:
        found.append(Candidate("cusparselt"))
    return found


@cache
def candidates(plan: str) -> tuple[Candidate, ...]:
    """The candidates of a plan; all dense for an empty one."""
    if not plan:
        return (DENSE,) * len(TOKENS)
    words = [word.partition(":")[::2] for word in plan.split()]
    return tuple(Candidate(kernel, tuple(map(int, variant.split(",") if variant else ()))) for kernel, variant in words)


def choose(plan: str, tokens: int) -> Candidate:
    """The candidate for the next power of two of tokens."""
    return candidates(plan)[min((tokens - 1).bit_length(), len(TOKENS) - 1)]


def linear(x: Tensor, weight: Packed, bias: Tensor | None, plan: str, cusparselt: Tensor) -> Tensor:
    """x Wᵀ + b [..., rows] as the plan says, for x [..., columns] in the dtype of the weight.

    `cusparselt` is the weight in cuSPARSELt's own format; empty if the plan does not need it.
    """
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], rows)
    return run(choose(plan, len(flat)), flat, weight, bias, cusparselt).reshape(*x.shape[:-1], rows)


def run(candidate: Candidate, x: Tensor, weight: Packed, bias: Tensor | None, cusparselt: Tensor) -> Tensor:
    """x Wᵀ + b [tokens, rows] by a candidate, for x [tokens, columns] of at least one token."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if candidate.kernel == "triton":
            return gpu.linear(x, weight, bias, Tiling._make(candidate.variant))
        if candidate.kernel == "dense":
            return torch.nn.functional.linear(x, gpu.expand(weight), bias)
        if not cusparselt.numel():
            raise RuntimeError(
                f"{candidate} is not prepared: a compiled graph has an older plan; delete the compiler's cache"
            )
        tokens = x.shape[0]
        inputs = torch.nn.functional.pad(x, (0, 0, 0, -tokens % 8)).contiguous().T  # their tiles are 8 tokens wide
        y = torch._cslt_sparse_mm(cusparselt, inputs, bias=bias, transpose_result=True, alg_id=candidate.variant[0])
        return y[:tokens].contiguous()


def for_cusparselt(weight: Packed, kernels: set[str]) -> Tensor:
    """The weight in cuSPARSELt's own format, another 9/16 of the dense bytes; empty if it is not among these kernels.

    RuntimeError if cuSPARSELt does not take the shape, dtype or device.
    """
    if "cusparselt" not in kernels:
        return weight.values.new_empty(0)
    with torch.cuda.device_of(weight.values):  # type: ignore[no-untyped-call]
        dense = gpu.expand(weight)
        SparseSemiStructuredTensorCUSPARSELT._validate_device_dim_dtype_shape(dense)
        return torch._cslt_compress(dense)


def _measured_plan(weight: Packed) -> str:
    rows, columns = weight.shape
    Progress().say(f"timing kernels for {weight.layout} weights of {rows}×{columns} (once on this machine) …")
    with torch.cuda.device_of(weight.values), torch.no_grad():  # type: ignore[no-untyped-call]
        return " ".join(str(fastest(measure(weight, tokens)[0])) for tokens in TOKENS)


def fastest(times: dict[Candidate, float]) -> Candidate:
    return min(times, key=lambda one: times[one] * (WORTH_A_COPY if one.kernel == "cusparselt" else 1.0))


def measure(weight: Packed, tokens: int) -> tuple[dict[Candidate, float], dict[str, str]]:
    """Milliseconds of every candidate for that many tokens, and why others were excluded."""
    generator = torch.Generator(weight.values.device).manual_seed(0)
    x = torch.randn(tokens, weight.shape[1], generator=generator, device=weight.values.device).to(weight.dtype)
    expected = torch.nn.functional.linear(x, gpu.expand(weight))
    times: dict[Candidate, float] = {}
    excluded: dict[str, str] = {}
    for candidate in _possible(weight, tokens):
        try:
            copy = for_cusparselt(weight, {candidate.kernel})
            if candidate.kernel == "cusparselt":
                found = torch._cslt_sparse_mm_search(copy, x.contiguous().T, transpose_result=True)
                candidate = Candidate("cusparselt", (found,))
            call = partial(run, candidate, x, weight, None, copy)
            if bool((call() - expected).abs().max() <= AGREEMENT * expected.abs().max()):
                times[candidate] = milliseconds(call)
            else:
                warnings.warn(f"{candidate} computes another product on this GPU and is not used", stacklevel=2)
                excluded[str(candidate)] = "another product"
        except Exception as error:  # Triton raises many kinds if a tiling needs more than the GPU has
            excluded[str(candidate)] = f"{type(error).__name__}: {first_line(error)}"
    return times, excluded


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Median device time of a call, with the L2 cache flushed before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    event = partial(torch.cuda.Event, enable_timing=True)
    spans = [(event(), event()) for _ in range(REPEATS)]
    for _ in range(WARM_UP):
        call()
    # The device waits until the host has queued everything: gaps between launches do not count.
    torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
    for start, end in spans:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in spans)
