"""Does sparsity pay on this CPU? Kernels and a whole model, sparse beside dense, in one process and one run.

    python benchmarks/cpu_decode.py --model PRUNED --onnx PRUNED-ONNX PRUNED-ONNX-KERNELS --json result.json
    python benchmarks/cpu_decode.py --quantised

The kernel part times y = x Wᵀ for 4096×4096 weights, rotating over more matrices than the last-level cache holds:
torch's dense product, a dense kernel written with the same care as ours (`dense_kernel.c`, the honest yardstick), and
the bitmask kernel at 50 % unstructured and at 2:4. The model part decodes greedily in every way there is to run the
same weights, in turn: torch dense and bitmask, ONNX Runtime dense and on our operator, llama.cpp where its package
(llama-cpp-python) is installed. Medians over interleaved rounds; the first is warm-up.

With --quantised only kernels of 8 and 4 bits are timed: packed at 50 % unstructured, beside dense ones written with the
same care (`dense_quantised.c`). Matrices stay where rounds leave them, in the cache if they fit; the best call counts.
Packed kernels round x to 16 bits, the yardsticks to 8.
"""

import argparse
import copy
import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ending import exit_after
from llama_cpp_model import LlamaCpp, write_gguf
from rich.console import Console
from rich.table import Table

from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import row_starts
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.machine import environment
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.measure.runtimes import Runtime, TorchRuntime, load_runtime
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models import manifest
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.loading import load_model
from gblm_compress.models.packed_checkpoint import pack_
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress

SIZE, ROTATE_BYTES = 4096, 1 << 30
PAUSE_S = 0.3  # in which the threads of the runtime before stop spinning


def interleaved(candidates: dict[str, Callable[[int], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds a call of each candidate, which gets the index of the matrix to use."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            for index in range(calls):
                call(number * calls + index)
            if number:
                times[name].append(1000 * (time.perf_counter() - start) / calls)
    return {name: median(values) for name, values in times.items()}


def dense_yardstick() -> Any:
    """`dense_kernel.c`, compiled now."""
    library = Path(tempfile.mkdtemp()) / "dense.so"
    source = Path(__file__).with_name("dense_kernel.c")
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).dense_linear
    pointer = ctypes.c_void_p
    function.argtypes = [pointer] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 2 + [pointer] * 2
    return function


def sparse_product(x: torch.Tensor, copies: list[cpu.Bitmask], i: int) -> Any:
    """x Wᵀ with the i-th copy of a packed weight."""
    return copies[i % len(copies)].linear(x)


def kernels(dtype: torch.dtype, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """The kernel part for one dtype and token count: one row for each pattern."""
    copies = ROTATE_BYTES // (SIZE * SIZE * dtype.itemsize)
    base = torch.randn(SIZE, SIZE).to(dtype)
    dense = [base.clone() for _ in range(copies)]
    x = torch.randn(tokens, SIZE).to(dtype)
    y = torch.empty(1, SIZE)
    yardstick, pool = dense_yardstick(), cpu._openmp_of_torch()
    rows = []
    for name in ("unstructured", "2:4"):
        mask = Pattern(name).mask(base.float().abs(), base.float(), 0.5)
        packed = LAYOUTS["bitmask"].kind.pack(base.masked_fill(~mask, 0.0))
        starts = row_starts(packed["mask"])
        sparse = [cpu.Bitmask(packed["mask"].clone(), packed["values"].clone(), starts, SIZE) for _ in range(copies)]
        candidates: dict[str, Callable[[int], Any]] = {
            "torch_ms": lambda i: torch.nn.functional.linear(x, dense[i % copies]),
            "sparse_ms": partial(sparse_product, x, sparse),
        }
        if tokens == 1:
            candidates["dense_kernel_ms"] = lambda i: yardstick(
                dense[i % copies].data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                SIZE,
                SIZE,
                int(dtype == torch.bfloat16),
                torch.get_num_threads(),
                *pool,
            )
        times = interleaved(candidates, rounds, copies)
        limit = base.nbytes / (packed["mask"].nbytes + packed["values"].nbytes)
        row = {
            "pattern": name,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            **times,
            "over_torch": times["torch_ms"] / times["sparse_ms"],
            "byte_limit": limit,
        }
        if tokens == 1:
            over = times["dense_kernel_ms"] / times["sparse_ms"]
            row |= {"over_dense_kernel": over, "share_of_byte_limit": over / limit}
        rows.append(row)
    return rows


def model(options: argparse.Namespace, dtype: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The model part: facts about the packed model, and one row for each way to run it.

    All decode the same prompt in turn, in one process: torch dense with the masked weights, torch on the bitmask
    layout, and in fp32 the ONNX exports given; llama.cpp, dense, where its package is installed.
    """
    source = resolve_model(options.model, Progress(quiet=True))
    dense = load_model(source, dtype)
    names = manifest.pruned_layers(source, dense)
    sparse = copy.deepcopy(dense)
    pack_(sparse, names)
    threads = torch.get_num_threads()
    ids = torch.randint(0, dense.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    runtimes: dict[str, Runtime | LlamaCpp] = {
        "torch dense": TorchRuntime(dense),
        "torch bitmask": TorchRuntime(sparse),
    }
    if dtype == "float32":
        for folder in options.onnx:
            export = resolve_model(folder, Progress(quiet=True))
            kind = "operator" if export.needs_operator else "dense"
            runtimes[f"onnxruntime {kind}"] = OnnxRuntime(export, "cpu", threads)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if find_spec("llama_cpp"):
            # fp16 beside bf16, in which llama.cpp is slow on CPUs without its newest kernels
            for kind in ("float32",) if dtype == "float32" else ("bfloat16", "float16"):
                path = write_gguf(dense, kind, Path(folder) / f"{kind}.gguf")
                llama = LlamaCpp(path, threads, options.prompt + options.generate)
                runtimes[f"llama.cpp dense {kind}"] = stack.enter_context(closing(llama))
        times, tokens = generations(runtimes, ids, options.rounds, options.generate)
    dense_bytes = sum(dense.get_submodule(name).weight.nbytes for name in names)
    packed_bytes = sum(sparse.get_submodule(name).packed_bytes for name in names)
    head_bytes = dense.lm_head.weight.nbytes
    facts = {
        "model": Path(options.model).name,
        "dtype": dtype,
        "threads": threads,
        "byte_limit": (dense_bytes + head_bytes) / (packed_bytes + head_bytes),
        "resident_weight_ratio": packed_bytes / dense_bytes,
        "kernel_for_1_token": sparse.get_submodule(names[0]).kernel(1),
        "kernel_for_prompt": sparse.get_submodule(names[0]).kernel(options.prompt),
    }
    base_prefill, base_decode = times["torch dense"]
    rows = [
        {
            "execution": name,
            "dtype": dtype,
            "threads": threads,
            "prefill_ms": prefill,
            "ms_per_token": decode,
            "prefill_over_torch_dense": base_prefill / prefill,
            "decode_over_torch_dense": base_decode / decode,
            "identical_tokens": tokens[name] == tokens["torch dense"],
        }
        for name, (prefill, decode) in times.items()
    ]
    return facts, rows


def generations(
    runtimes: dict[str, Any], ids: torch.Tensor, rounds: int, generate: int
) -> tuple[dict[str, tuple[float, float]], dict[str, list[Any]]]:
    """(median prefill, median ms a step) and the greedy tokens of each runtime, in interleaved rounds.

    Args:
        ids: prompts of the same length, decoded together.
        generate: tokens for each prompt: the first by the prefill, the others by a step each.
    """
    prefill: dict[str, list[float]] = {name: [] for name in runtimes}
    decode: dict[str, list[float]] = {name: [] for name in runtimes}
    tokens: dict[str, list[Any]] = {}
    for number in range(rounds + 1):
        for name, runtime in runtimes.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            token, cache = runtime.next_token(ids, None)
            first = time.perf_counter()
            tokens[name] = [token.tolist()]
            for _ in range(generate - 1):
                token, cache = runtime.next_token(token, cache)
                tokens[name].append(token.tolist())
            if number:
                prefill[name].append(1000 * (first - start))
                decode[name].append(1000 * (time.perf_counter() - first) / (generate - 1))
    return {name: (median(prefill[name]), median(decode[name])) for name in runtimes}, tokens


def load_and_decode(folder: Path, there: Connection) -> None:
    """Send the seconds until an export is loaded, and milliseconds of a token; for a process of its own."""
    start = time.perf_counter()
    runtime = load_runtime(ModelSource(folder.name, folder), "auto", "cpu", torch.get_num_threads())
    seconds = time.perf_counter() - start
    times, _ = generations({"": runtime}, torch.arange(16).unsqueeze(0), rounds=3, generate=8)
    there.send((seconds, times[""][1]))


def quantised_yardstick() -> Any:
    """`dense_quantised.c`, compiled now."""
    library = Path(tempfile.mkdtemp()) / "dense_quantised.so"
    source = Path(__file__).with_name("dense_quantised.c")
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).dense_quantised
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 2
    return function


def quantised(rows: int, rounds: int) -> list[dict[str, Any]]:
    """Packed kernels of 8 and 4 bits beside the yardsticks, on one thread, for a weight of `rows` rows."""
    x, y = torch.randn(1, SIZE), torch.empty(rows)
    rounded = torch.randint(0, 255, (SIZE,), dtype=torch.uint8)
    yardstick = quantised_yardstick()
    candidates: dict[tuple[str, int, int], Callable[[], Any]] = {}
    sizes: dict[tuple[str, int, int], int] = {}
    for bits, layout in ((8, "bitmask-int8"), (4, "bitmask-int4")):
        for group in (0, 64):
            weight = torch.randint(0, 255, (rows, SIZE * bits // 8), dtype=torch.uint8)
            scales, sums = torch.ones(rows, SIZE // group if group else 1).half(), torch.zeros(rows)
            tensors = [weight, torch.nn.functional.pad(scales.flatten(), (0, 16)), sums, rounded, y]
            dense, packed = ("dense", bits, group), ("packed", bits, group)
            candidates[dense] = partial(_call_yardstick, yardstick, tensors, bits, group)
            sizes[dense] = weight.nbytes + scales.nbytes
            values = torch.randn(rows, SIZE)
            values[torch.rand(rows, SIZE) < 0.5] = 0.0
            keep = values != 0
            levels = torch.arange(-120, 121, 16).char() if bits == 4 else torch.arange(-127, 128).char()
            largest = values.abs().reshape(rows, scales.shape[1], -1).amax(-1)
            grid = Grid((largest / 127).half(), levels, group or None)
            layer = PackedLinear.from_dense(layout, values * keep, grid=grid)
            candidates[packed] = partial(layer, x)
            sizes[packed] = layer.packed_bytes
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, call in candidates.items():
            for _ in range(2):
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return [
        {
            "shape": f"{rows}x{SIZE}",
            "weights": f"{kind} int{bits}",
            "group": group or "row",
            "ms": 1000 * best[kind, bits, group],
            "GB/s": sizes[kind, bits, group] / best[kind, bits, group] / 1e9,
            "over_dense": best["dense", bits, group] / best[kind, bits, group],
            "byte_limit": sizes["dense", bits, group] / sizes[kind, bits, group],
        }
        for kind, bits, group in candidates
    ]


def _call_yardstick(function: Any, tensors: list[torch.Tensor], bits: int, group: int) -> None:
    function(*(tensor.data_ptr() for tensor in tensors), len(tensors[0]), SIZE, bits, group)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of figures."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)


def main() -> None:
    """Run both parts and print tables; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pruned folder; without one, only kernels are timed")
    parser.add_argument("--onnx", nargs="*", default=[], metavar="FOLDER", help="its ONNX exports, dense and --kernels")
    parser.add_argument("--quantised", action="store_true", help="time kernels of 8 and 4 bits, and nothing else")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    silence_libraries()
    if not cpu.available():
        raise SystemExit("the compiled kernels are missing: install with a C compiler at hand, then run this again")
    if "avx512" not in cpu.paths(torch.float32):
        raise SystemExit("the dense kernels that this compares with need AVX-512, which this CPU lacks; see sizes.py")
    if options.quantised:
        torch.set_num_threads(1)
        rows = [row for size in (SIZE, 4 * SIZE) for row in quantised(size, 6 * options.rounds)]
        show("quantised kernels, 1 token, 1 thread, best of all calls", rows)
        if options.json:
            options.json.write_text(json.dumps({"environment": environment(), "quantised": rows}, indent=2) + "\n")
        return
    result: dict[str, Any] = {"environment": environment(), "kernels": [], "models": [], "field": []}
    for threads in sorted(set(options.threads)):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            result["kernels"] += kernels(dtype, 1, options.rounds) + kernels(dtype, 4, options.rounds)
        if options.model:
            for name in ("float32", "bfloat16"):
                facts, rows = model(options, name)
                result["models"].append(facts)
                result["field"] += rows
    for tokens in (1, 4):
        rows = [row for row in result["kernels"] if row["tokens"] == tokens]
        show(f"kernel, {SIZE}×{SIZE}, {tokens} tokens", rows)
    if result["models"]:
        show("packed model", result["models"])
        show(f"prompt of {options.prompt}, {options.generate} greedy tokens", result["field"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    exit_after(main)
