"""Does sparsity pay on this GPU? Kernels and a whole model, sparse beside dense, in one run of a few minutes.

    PYTHONPATH=. python benchmarks/gpu.py --json result.json

Needs torch, triton, transformers and what that brings, nothing else: no network, no data, no installation of the
package.

kernels      y = x Wᵀ for the layers of a LLaMA of 7B and of one of 1B parameters, 1 to 4096 tokens: torch's dense
             product, the Triton kernels of both layouts, cuSPARSELt, and dense after unpacking. Each is
             repeated within a CUDA graph over copies of the weight that do not fit the L2 cache together.
one token    the same layers in float16 and in bfloat16, for decoding one sequence: cuBLAS, as a linear layer and as a
             matrix times a vector, beside Triton on half of the weights, unstructured (bitmask) and 2:4 (sparse24); and
             what others have published.
levels       the same in bfloat16 for weights of 8 bits, a scale for each row, and of 4, a scale for each 64 columns.
model        prefill and decode of a Llama of 1.1B parameters with random weights, 2:4, dense and in both layouts:
             eager, compiled, and both within CUDA graphs. The dense model has the same zeros.
pruning      time and device memory to prune a few blocks of a LLaMA of 7B with random weights, streamed: the block at
             work on the GPU, everything else on the host; and from it the time for all of them. Needs pydantic
             and psutil as well.
onnxruntime  one layer in ONNX Runtime on CUDA and TensorRT, where those are installed.

Figures are medians; the first calls are warm-up and dropped. What did not run says why, and what the time did not
suffice for is listed. `--dry-run` runs every section at toy size on the CPU, kernels under Triton's interpreter: its
times mean nothing.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

Rows = list[dict[str, Any]]
REPEATS, WARM_UP = 9, 3
PRUNING_REPEATS = 3
ROTATE_BYTES = 200 << 20  # several times the L2 cache
LAYERS_7B = {"attention": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}
LAYERS_1B = {"q, o": (2048, 2048), "k, v": (256, 2048), "gate, up": (5632, 2048), "down": (2048, 5632)}


@dataclass(frozen=True)
class Size:
    """What is measured at full size and in a dry run."""

    layers: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    model: dict[str, int]
    context: int
    decode_batches: tuple[int, ...]
    prompts: tuple[int, ...]
    pruned_model: dict[str, int]
    pruned_blocks: tuple[int, int]
    samples: int
    sample_length: int


FULL = Size(
    layers={f"7B {name}": shape for name, shape in LAYERS_7B.items()}
    | {f"1B {name}": shape for name, shape in LAYERS_1B.items()},
    tokens=(1, 16, 2048, 4, 64, 512, 8, 128, 1024, 4096, 2, 32, 256),  # where time runs out, the later ones are missing
    model={
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    context=128,
    decode_batches=(1, 16),
    prompts=(128, 512, 1024, 2048, 4096),
    pruned_model={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    pruned_blocks=(1, 3),
    samples=128,
    sample_length=2048,
)
TOY = Size(
    layers={"toy": (32, 64)},
    tokens=(1, 8),
    model={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 257,
    },
    context=8,
    decode_batches=(1,),
    prompts=(8,),
    pruned_model={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 257,
    },
    pruned_blocks=(1, 2),
    samples=2,
    sample_length=16,
)

LEVELS = ("bitmask-int8", "bitmask-int4")
PUBLISHED = (
    {
        "what": "MACKO, products of a matrix and a vector: float16, half of the weights zero, unstructured",
        "over_dense": [1.2, 1.5],
        "source": "arXiv 2511.13061, abstract",
    },
    {
        "what": "MACKO, Llama-2-7B pruned by Wanda: float16, half of the weights zero, generation on an RTX 4090",
        "dense_tokens_per_second": 66.53,
        "tokens_per_second": 98.60,
        "over_dense": 1.48,
        "source": "github.com/vlejd/macko_spmv, media/README.md",
    },
    {
        "what": "MACKO on other GPUs: tested on an RTX 2080, 3090 and 4090; server GPUs (H100, V100) need a special "
        "optimisation, and a matrix-vector product that matches cuBLAS on the H100 is still looked for",
        "source": "github.com/vlejd/macko_spmv, README.md",
    },
)
"""What others measured, on other GPUs: context, not a comparison."""


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def share(self, fraction: float) -> "Clock":
        """A clock over a part of what is left."""
        return Clock(self.left * fraction)


@dataclass(frozen=True)
class Bench:
    """What every section is given."""

    device: str
    dtype: torch.dtype
    size: Size

    @property
    def on_cuda(self) -> bool:
        """False in a dry run."""
        return self.device == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def wall_milliseconds(self, call: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Median time from the call until the device is done, the host's part included; of one call in a dry run."""
        times = []
        for _ in range(WARM_UP + repeats if self.on_cuda else 1):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        return median(times[-repeats:])

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph; what it returned is kept, and written anew by every replay.

        Raises:
            RuntimeError: it cannot be captured.
        """
        if not self.on_cuda:
            raise RuntimeError("CUDA graphs need CUDA")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return lambda: (graph.replay(), result)

    def rotated_milliseconds(self, calls: list[Callable[[], Any]]) -> tuple[float, str]:
        """(time of one of the calls, how it was measured): all in one graph, or one after the other."""

        def together() -> None:
            for call in calls:
                call()

        try:
            return self.wall_or_event_milliseconds(self.graph(together)) / len(calls), "graph"
        except RuntimeError as error:
            return self.wall_or_event_milliseconds(together) / len(calls), f"no graph: {first_line(error)}"

    def wall_or_event_milliseconds(self, call: Callable[[], Any]) -> float:
        """Median time on the device; in a dry run, of the wall clock."""
        if not self.on_cuda:
            return self.wall_milliseconds(call)
        event = partial(torch.cuda.Event, enable_timing=True)
        spans = [(event(), event()) for _ in range(WARM_UP + REPEATS)]
        for start, end in spans:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in spans[WARM_UP:])

    def kernel_names(self, call: Callable[[], Any]) -> dict[str, int]:
        """What the profiler saw running on the device, and how often; on a CPU, the operators."""
        from torch.profiler import ProfilerActivity, profile

        call()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        with profile(activities=activities, acc_events=True) as record:
            call()
            self.synchronize()
        kind = torch.autograd.DeviceType.CUDA if self.on_cuda else torch.autograd.DeviceType.CPU
        return dict(Counter(event.name for event in record.events() if event.device_type == kind).most_common())


def masked(weight: Tensor, group: int = 4) -> Tensor:
    """A weight without all but the larger half of every `group` in a row: 2:4 by default; +0.0 elsewhere."""
    groups = weight.reshape(len(weight), -1, group)
    lost = groups.abs().argsort(-1)[..., : group // 2]
    return groups.scatter(-1, lost, 0.0).reshape(weight.shape)


@dataclass(frozen=True)
class Way:
    """A way to multiply: each call computes the same product from another copy of the weight, of so many bytes."""

    title: str
    variant: str
    bytes: int
    calls: list[Callable[[], Any]]

    def timed(self, bench: Bench, x: Tensor, rows: int) -> dict[str, Any]:
        """What is measured of it, for a weight of so many rows."""
        ms, timing = bench.rotated_milliseconds(self.calls)
        moved = self.bytes + x.nbytes + len(x) * rows * x.element_size()
        return {
            "execution": self.title,
            "variant": self.variant,
            "ms": ms,
            "gb_per_second": moved / ms / 1e6,
            "timing": timing,
        }


def dense_way(bench: Bench, title: str, weight: Tensor, x: Tensor, product: Callable[[Tensor], Any]) -> Way:
    """A dense product, a function of the weight."""
    each = copies(bench, weight.nbytes, weight.clone)
    return Way(title, "", weight.nbytes, [partial(product, weight) for weight in each])


def packed_ways(bench: Bench, packed: Any, x: Tensor) -> tuple[list[Way], dict[str, str]]:
    """The fastest variant of every kernel that multiplies by a packed weight; and of those that do not run, why."""
    from gblm_compress.layouts import cuda_linear
    from gblm_compress.layouts.cuda_linear import DENSE, Candidate

    if not bench.on_cuda:
        cuda_linear.milliseconds = bench.wall_milliseconds
    times, excluded = cuda_linear.measure(packed, len(x))
    layout = packed.layout
    read = {tensor.data_ptr(): tensor.nbytes for tensor in packed if isinstance(tensor, torch.Tensor)}
    size = sum(read.values())  # each tensor counted once
    ways = []
    for kernel in sorted({candidate.kernel for candidate in times}):
        best: Candidate = min((c for c in times if c.kernel == kernel), key=lambda c: times[c])
        title = {"triton": f"Triton {layout}", "dense": f"unpack {layout}, dense"}.get(kernel, kernel)
        copy_ = cuda_linear.for_cusparselt(packed, {kernel})
        calls = [
            partial(cuda_linear.run, best, x, each, None, copy_.clone())
            for each in copies(bench, size, partial(cloned, packed))
        ]
        ways.append(Way(title, str(best) if best != DENSE else "", size, calls))
    return ways, {f"{layout} {kernel}": reason for kernel, reason in excluded.items()}


def kernels(bench: Bench, clock: Clock, rows: Rows) -> dict[str, Any]:
    """The kernel grid; `rows` is filled as it goes."""
    weights = {
        name: masked(torch.randn(*shape, device=bench.device)).to(bench.dtype)
        for name, shape in bench.size.layers.items()
    }
    packed = {name: [pack(layout, weight) for layout in ("sparse24", "bitmask")] for name, weight in weights.items()}
    excluded: dict[str, str] = {}
    left_out, names = [], {}
    for tokens in bench.size.tokens:
        for name, weight in weights.items():
            if clock.left < 0:
                left_out.append(f"{name}, {tokens} tokens")
                continue
            x = torch.randn(tokens, weight.shape[1], device=bench.device).to(bench.dtype)
            ways = [dense_way(bench, "dense", weight, x, partial(nn.functional.linear, x))]
            for pack_ in packed[name]:
                found, why = packed_ways(bench, pack_, x)
                ways += found
                excluded |= {f"{kernel}, {name}, {tokens} tokens": reason for kernel, reason in why.items()}
            base = None
            for way in ways:
                measured = way.timed(bench, x, len(weight))
                ms = measured["ms"]
                base = base or ms
                limit = weight.nbytes / way.bytes
                rows.append(
                    {
                        "layer": name,
                        "rows": weight.shape[0],
                        "columns": weight.shape[1],
                        "tokens": tokens,
                        **measured,
                        "over_dense": base / ms,
                        "byte_limit": limit,
                        "share_of_byte_limit": base / ms / limit,
                        "tflop_per_second_dense_equivalent": 2 * tokens * weight.numel() / ms / 1e9,
                    }
                )
                if name == next(iter(weights)) and tokens in (1, 16, 2048, bench.size.tokens[-1]):
                    names[f"{way.title}, {tokens} tokens"] = bench.kernel_names(way.calls[0])
            del ways
    return {"excluded": excluded, "left_out": left_out, "profiler": names, "break_even": break_even(rows)}


def one_token(
    bench: Bench,
    clock: Clock,
    rows: Rows,
    dtypes: tuple[str, ...] = ("float16", "bfloat16"),
    layouts: tuple[str, ...] = ("bitmask", "sparse24"),
) -> dict[str, Any]:
    """cuBLAS and Triton for one token; `rows` is filled as it goes."""
    from gblm_compress.layouts import LAYOUTS

    left_out, names = [], {}
    for dtype in dtypes:
        here = replace(bench, dtype=getattr(torch, dtype))
        for name, shape in bench.size.layers.items():
            if clock.left < 0:
                left_out.append(f"{name}, {dtype}")
                continue
            weight = torch.randn(*shape, device=bench.device).to(here.dtype)
            x = torch.randn(1, shape[1], device=bench.device).to(here.dtype)
            ways = [
                dense_way(here, "cuBLAS, linear", weight, x, partial(nn.functional.linear, x)),
                dense_way(here, "cuBLAS, matrix times vector", weight, x, lambda copy_, x=x: torch.mv(copy_, x[0])),
            ]
            for layout in layouts:
                group = 4 if LAYOUTS[layout].pattern else shape[1]
                found, _ = packed_ways(here, pack(layout, masked(weight, group)), x)
                ways += [way for way in found if way.title.startswith("Triton")]
            measured = [way.timed(here, x, len(weight)) for way in ways]
            cublas = min(row["ms"] for row in measured if row["execution"].startswith("cuBLAS"))
            for way, row in zip(ways, measured, strict=True):
                over = {"over_cublas": cublas / row["ms"], "byte_limit": weight.nbytes / way.bytes}
                rows.append({"layer": name, "dtype": dtype, **row, **over})
                if name == next(iter(bench.size.layers)):
                    names[f"{way.title}, {dtype}"] = bench.kernel_names(way.calls[0])
            del ways
    return {"left_out": left_out, "profiler": names, "published": PUBLISHED}


def pack(layout: str, weight: Tensor) -> Any:
    """The weight in a layout, as the kernels read it."""
    from gblm_compress.layouts import LAYOUTS
    from gblm_compress.layouts.packed_linear import PackedLinear

    packed = LAYOUTS[layout].kind.pack(weight)
    return PackedLinear.holding(layout, weight.shape, packed, weight.dtype).for_gpu()


def cloned(packed: Any) -> Any:
    """A copy in memory of its own."""
    tensors = {part.data_ptr(): part.clone() for part in packed if isinstance(part, Tensor)}
    return type(packed)(*(tensors[part.data_ptr()] if isinstance(part, Tensor) else part for part in packed))


def copies(bench: Bench, size: int, make: Callable[[], Any]) -> list[Any]:
    """As many copies of a weight as the L2 cache does not hold; two in a dry run."""
    return [make() for _ in range(max(2, ROTATE_BYTES // size) if bench.on_cuda else 2)]


def break_even(rows: Rows) -> dict[str, Any]:
    """For each layer: up to how many tokens the Triton kernels beat dense, and from how many cuSPARSELt does."""
    result: dict[str, Any] = {}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == layer]

        def wins(prefix: str, of_layer: Rows = of_layer) -> dict[int, bool]:
            best: dict[int, float] = {}
            for row in of_layer:
                if row["execution"].startswith(prefix):
                    best[row["tokens"]] = max(row["over_dense"], best.get(row["tokens"], 0.0))
            return {tokens: best[tokens] > 1 for tokens in sorted(best)}

        triton, cusparselt = wins("Triton"), wins("cusparselt")
        up_to, from_ = None, None
        for tokens, won in triton.items():
            if not won:
                break
            up_to = tokens
        for tokens, won in reversed(cusparselt.items()):
            if not won:
                break
            from_ = tokens
        result[layer] = {"triton_wins_up_to_tokens": up_to, "cusparselt_wins_from_tokens": from_}
    return result


def random_llama(bench: Bench, sizes: dict[str, int]) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False, use_cache=True)
    torch.manual_seed(0)
    with torch.device(bench.device):
        return LlamaForCausalLM(config).to(bench.dtype).eval()


def block_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers inside the blocks."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and "layers." in name]


@torch.no_grad()
def model(bench: Bench, clock: Clock, rows: Rows) -> dict[str, Any]:
    """Prefill and decode of a whole model; `rows` is filled as it goes."""
    from gblm_compress.models.architecture import cache_argument
    from gblm_compress.models.packed_checkpoint import pack_

    dense = random_llama(bench, bench.size.model)
    names = block_layers(dense)
    for name in names:
        weight = dense.get_submodule(name).weight
        weight.copy_(masked(weight))
    models = {"dense": dense}
    for layout in ("sparse24", "bitmask"):
        models[layout] = copy.deepcopy(dense)
        pack_(models[layout], names, layout)
    argument = cache_argument(dense)
    head = sum(p.nbytes for n, p in dense.named_parameters() if not n.startswith("model.embed") and not in_layers(n))
    block_bytes = {"dense": sum(dense.get_submodule(name).weight.nbytes for name in names)} | {
        layout: sum(models[layout].get_submodule(name).packed_bytes for name in names)
        for layout in ("sparse24", "bitmask")
    }
    vocabulary = dense.config.vocab_size
    ids = {n: torch.randint(0, vocabulary, (1, n), device=bench.device) for n in bench.size.prompts}
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in dense.parameters()),
        "block_bytes": block_bytes,
        "resident_block_bytes": {
            layout: sum(each.nbytes for name in names for each in models[layout].get_submodule(name).buffers())
            for layout in ("sparse24", "bitmask")
        },
        "other_bytes_read_by_a_token": head,
        "profiler": {},
        "kernels": {},
        "agreement": {},
        "failed": {},
        "left_out": [],
    }

    def prefill(name: str, tokens: int) -> Callable[[], Tensor]:
        return partial(prefill_step, models[name], ids[tokens])

    def decode(name: str, batch: int) -> Callable[[], Tensor]:
        prompt = torch.randint(0, vocabulary, (batch, bench.size.context), device=bench.device)
        cache = models["dense"](input_ids=prompt, use_cache=True)[argument]
        return partial(decode_step, models[name], argument, prompt[:, :1].contiguous(), cache)

    works = [("decode", batch, decode) for batch in bench.size.decode_batches]
    works += [("prefill", tokens, prefill) for tokens in bench.size.prompts]
    for phase, count, make in works:  # what the sparse models run, and whether it is the dense model's result
        for name in ("sparse24", "bitmask"):
            torch.manual_seed(count)
            expected = make("dense", count)()
            torch.manual_seed(count)
            got = make(name, count)()
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            facts["agreement"][f"{name} {phase} {count}"] = {
                "largest_difference_over_largest_logit": error,
                "same_greedy_tokens": (got.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            }
            layers = [models[name].get_submodule(layer) for layer in names]
            facts["kernels"][f"{name} {phase} {count}"] = dict(Counter(layer.kernel(count) for layer in layers))
    for name in models:
        facts["profiler"][f"{name} decode"] = bench.kernel_names(decode(name, 1))
        facts["profiler"][f"{name} prefill"] = bench.kernel_names(prefill(name, bench.size.prompts[-1]))
    base: dict[tuple[str, int, str], float] = {}

    def measure(name: str, phase: str, count: int, mode: str, call: Callable[[], Any]) -> None:
        graphed = mode.endswith("graph")
        try:
            timed = bench.graph(call) if graphed else call
            ms = bench.wall_or_event_milliseconds(timed) if graphed else bench.wall_milliseconds(timed)
        except Exception as error:
            facts["failed"][f"{name} {phase} {count}, {mode}"] = first_line(error)
            return
        if name == "dense":
            base[phase, count, mode] = ms
        dense_ms = base.get((phase, count, mode))
        limit = (block_bytes["dense"] + head) / (block_bytes[name] + head)
        row = {
            "execution": name,
            "phase": phase,
            "batch" if phase == "decode" else "tokens": count,
            "mode": mode,
            "ms": ms,
            "tokens_per_second": 1000 * count / ms,
            "over_dense": dense_ms / ms if dense_ms else None,
        }
        if phase == "decode":
            row |= {"byte_limit": limit, "gb_per_second": (block_bytes[name] + head) / ms / 1e6}
            row["share_of_byte_limit"] = dense_ms / ms / limit if dense_ms else None
        rows.append(row)

    for mode in ("graph", "eager"):
        for phase, count, make in works:
            for name in models:
                if clock.left < 0:
                    facts["left_out"].append(f"{name} {phase} {count}, {mode}")
                else:
                    measure(name, phase, count, mode, make(name, count))
    backend = "inductor" if bench.on_cuda else "eager"
    phases = (("decode", bench.size.decode_batches[0], decode), ("prefill", bench.size.prompts[-2:][0], prefill))
    longest = 30.0 if bench.on_cuda else 0.0  # seconds that a compilation may take
    for phase, count, make in phases:
        for name in ("dense", "sparse24", "bitmask"):
            if clock.left < 1.5 * longest:
                facts["left_out"].append(f"{name} {phase} {count}, compiled")
                continue
            start = time.monotonic()
            torch.compiler.reset()
            call = make(name, count)
            compiled = partial(torch.compile(call.func, backend=backend, dynamic=False), *call.args)
            measure(name, phase, count, "compiled", compiled)
            measure(name, phase, count, "compiled graph", compiled)
            longest = max(longest, time.monotonic() - start)
    return facts


def in_layers(name: str) -> bool:
    """Whether a parameter belongs to a linear layer of a block."""
    return ".layers." in name and "norm" not in name


def prefill_step(model: Any, ids: Tensor) -> Tensor:
    """The logits of the last token of a prompt [1, tokens]; keys and values are computed and kept."""
    logits: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    return logits


def decode_step(model: Any, argument: str, token: Tensor, past: Any) -> Tensor:
    """The logits after one more token [batch, 1]; the same however often it is called: the cache `past` stays as it is.

    A layer of the cache puts longer keys and values in the place of its own; on shallow copies nobody sees that.
    """
    cache = copy.copy(past)
    cache.layers = [copy.copy(layer) for layer in past.layers]
    output = model(input_ids=token, use_cache=True, logits_to_keep=1, **{argument: cache})
    logits: Tensor = output.logits[:, -1].float()
    return logits


def pruning(bench: Bench, clock: Clock, rows: Rows) -> dict[str, Any]:
    """Seconds and device memory to prune a few blocks, streamed, for two numbers of blocks; lines give the whole model.

    The line through the medians gives the time of all blocks; the flattest and the steepest line through what was
    measured, its spread. What is left out: reading text, saving and verifying.
    """
    if absent := [name for name in ("pydantic", "psutil") if find_spec(name) is None]:
        return {"skipped": f"pruning needs packages that are not installed: {', '.join(absent)}"}
    size = bench.size
    shape = (1, size.sample_length)
    samples = [
        {"input_ids": torch.randint(0, size.pruned_model["vocab_size"], shape, device=bench.device)}
        for _ in range(size.samples)
    ]
    few, many = size.pruned_blocks
    total = size.pruned_model["num_hidden_layers"]
    left_out = []
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for blocks in (few, many):
            models[blocks] = Path(folder) / f"{blocks}-blocks"
            random_llama(bench, size.pruned_model | {"num_hidden_layers": blocks}).save_pretrained(models[blocks])
        for method in ("wanda", "gblm"):
            costs: dict[int, list[tuple[float, int]]] = {few: [], many: []}
            for blocks in (few, many):
                if clock.left < 0:
                    left_out.append(f"{method}, {blocks} blocks")
                    continue
                prune_streamed(bench, models[blocks], samples[:2], method)  # warm-up: kernels are loaded and chosen
                for _ in range(PRUNING_REPEATS):
                    costs[blocks].append(prune_streamed(bench, models[blocks], samples, method))
            if all(costs.values()):
                one, other = ([seconds for seconds, _ in costs[blocks]] for blocks in (few, many))
                slopes = [(b - a) / (many - few) for a in one for b in other]
                slope = (median(other) - median(one)) / (many - few)
                rows.append(
                    {
                        "method": method,
                        "samples": size.samples,
                        "sample_length": size.sample_length,
                        **{f"seconds_{blocks}_blocks": median(s for s, _ in costs[blocks]) for blocks in costs},
                        "seconds_a_block": slope,
                        f"seconds_{total}_blocks_extrapolated": median(one) + slope * (total - few),
                        "from": min(one) + min(slopes) * (total - few),
                        "to": max(one) + max(slopes) * (total - few),
                        **{f"device_bytes_{blocks}_blocks": max(b for _, b in costs[blocks]) for blocks in costs},
                    }
                )
    return {"left_out": left_out}


def prune_streamed(bench: Bench, folder: Path, samples: list[dict[str, Tensor]], method: str) -> tuple[float, int]:
    """(seconds, peak of device memory in bytes) of the walk over a checkpoint whose blocks are read one at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from gblm_compress.calibration.ranks import Ranks
    from gblm_compress.calibration.weights import StatePool, StreamedWeights
    from gblm_compress.models.source import ModelSource
    from gblm_compress.progress import Progress
    from gblm_compress.pruning.planning import Placement, Plan, uniform_budgets
    from gblm_compress.pruning.run_folder import RunFolder
    from gblm_compress.pruning.walk import Walk
    from gblm_compress.settings import PruneSettings
    from gblm_compress.tasks import TASKS

    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config).to(bench.dtype).eval().requires_grad_(False)
    skeleton.model.rotary_emb = type(skeleton.model.rotary_emb)(config=config)  # its buffers are not in the checkpoint
    if bench.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    bench.synchronize()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        ranks = Ranks()
        run = RunFolder(Path(work) / "run", {}, resume=False, ranks=ranks)
        device = torch.device(bench.device)
        settings = PruneSettings(method=method, pattern="2:4", fit="none")
        plan = Plan(
            settings=settings,
            task=TASKS["causal-lm"],
            samples=samples,
            budgets=uniform_budgets(skeleton, settings),
            device=device,
            dtype=str(bench.dtype).removeprefix("torch."),
            products="float32",
            placement=Placement(offload=True, states=32 << 30, by_sample=False),
            ranks=ranks,
        )
        weights = StreamedWeights(ModelSource("random", folder), skeleton, bench.device)
        Walk(plan, weights, run, StatePool(run.states, plan.placement.states, device), Progress(quiet=True)).prune_()
        bench.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if bench.on_cuda else 0


def onnxruntime(bench: Bench, clock: Clock, rows: Rows) -> dict[str, Any]:
    """One 2:4 layer in ONNX Runtime: on CUDA, which ignores zeros; on TensorRT without and with sparse tactics."""
    missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    import onnxruntime

    available = onnxruntime.get_available_providers()
    wanted = {
        "CUDA": ("CUDAExecutionProvider", {}),
        "TensorRT": ("TensorrtExecutionProvider", {"trt_fp16_enable": "1"}),
        "TensorRT, sparse": (
            "TensorrtExecutionProvider",
            {"trt_fp16_enable": "1", "trt_sparsity_enable": "1", "trt_detailed_build_log": "1"},
        ),
    }
    if not bench.on_cuda:
        wanted["CPU"] = ("CPUExecutionProvider", {})
    facts: dict[str, Any] = {"version": onnxruntime.__version__, "providers": available, "skipped": {}, "tactics": {}}
    name, (outputs, inputs) = next(iter(bench.size.layers.items()))
    for title, (provider, options) in wanted.items():
        if provider not in available:
            facts["skipped"][title] = f"this ONNX Runtime has no {provider}; it has {', '.join(available)}"
            continue
        for tokens in (1, 2048) if bench.on_cuda else (1, 8):
            if clock.left < 0:
                facts["skipped"][f"{title}, {tokens} tokens"] = "no time was left"
                continue
            try:
                session, log = onnx_session(provider, options, tokens, outputs, inputs)
            except Exception as error:  # onnxruntime raises kinds of its own, which share no base
                facts["skipped"][f"{title}, {tokens} tokens"] = first_line(error)
                continue
            if session.get_providers()[0] != provider:
                facts["skipped"][f"{title}, {tokens} tokens"] = f"fell back to {session.get_providers()[0]}"
                continue
            if "sparse" in title:
                facts["tactics"][f"{tokens} tokens"] = [line for line in log.splitlines() if "parsity" in line][:20]
            binding = session.io_binding()
            x = torch.randn(tokens, inputs, device=bench.device).half()
            y = torch.empty(tokens, outputs, device=bench.device).half()
            for bind, tensor, key in ((binding.bind_input, x, "x"), (binding.bind_output, y, "y")):
                bind(key, bench.device, 0, "float16", tuple(tensor.shape), tensor.data_ptr())
            ms = bench.wall_milliseconds(partial(session.run_with_iobinding, binding))
            rows.append({"layer": name, "tokens": tokens, "execution": title, "ms": ms})
    return facts


def onnx_session(provider: str, options: dict[str, str], tokens: int, outputs: int, inputs: int) -> tuple[Any, str]:
    """A session for y = x Wᵀ with a 2:4 weight in fp16, and what was written to stderr while it was made."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = masked(torch.randn(outputs, inputs)).half().numpy()
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [tokens, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [tokens, outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(weight), "w")],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 1 if "trt_detailed_build_log" in options else 3
    with captured_stderr() as read:
        session = onnxruntime.InferenceSession(content.SerializeToString(), settings, providers=[(provider, options)])
        return session, read()


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """What C libraries write to stderr meanwhile, by the function that is yielded."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode(errors="replace"))[1]
        finally:
            os.dup2(before, 2)
            os.close(before)


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def environment(bench: Bench) -> dict[str, Any]:
    """The machine and its versions, and what its memory can do."""
    from gblm_compress.machine import environment

    found = environment() | {"dtype": str(bench.dtype), "dry_run": not bench.on_cuda}
    if bench.on_cuda:
        properties = torch.cuda.get_device_properties(0)
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        ms = bench.wall_or_event_milliseconds(lambda: target.copy_(source))
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_bytes": getattr(properties, "L2_cache_size", None),
            "copy_gb_per_second_read_and_written": 2 * source.nbytes / ms / 1e6,
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
        }
    return found


# Each section fills rows of figures and returns facts about them; the number is its share of the time then left.
SECTIONS: dict[str, tuple[Callable[[Bench, Clock, Rows], dict[str, Any]], float]] = {
    "kernels": (kernels, 0.4),
    "one token": (one_token, 0.2),
    "levels": (partial(one_token, dtypes=("bfloat16",), layouts=LEVELS), 0.2),
    "model": (model, 0.75),
    "pruning": (pruning, 0.9),
    "onnxruntime": (onnxruntime, 1.0),
}


def show_kernels(rows: Rows) -> Table:
    """Speed-up over dense, a line for each layer and number of tokens."""
    executions = list(dict.fromkeys(row["execution"] for row in rows if row["execution"] != "dense"))
    table = Table("layer", "tokens", "dense ms", *executions, title="kernels: dense time over each one's time")
    for layer in dict.fromkeys(row["layer"] for row in rows):
        for tokens in sorted({row["tokens"] for row in rows if row["layer"] == layer}):
            line = {row["execution"]: row for row in rows if (row["layer"], row["tokens"]) == (layer, tokens)}
            ratios = [f"{line[name]['over_dense']:.2f}" if name in line else "" for name in executions]
            table.add_row(layer, str(tokens), f"{line['dense']['ms']:.4f}", *ratios)
    return table


def show(title: str, rows: Rows) -> Table:
    """The rows as they are."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        cells = (row.get(column) for column in columns)
        table.add_row(*("" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    return table


def main() -> None:
    """Run the sections, print tables, and write what there is after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--seconds", type=float, default=480, help="after which no further measurement begins")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", help="at toy size on the CPU")
    options = parser.parse_args()
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: so, from the start
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --dry-run shows that the script runs, on the CPU")
    warnings.filterwarnings("ignore", message=".*[Pp]rototype.*")
    bench = Bench("cpu" if options.dry_run else "cuda", getattr(torch, options.dtype), TOY if options.dry_run else FULL)
    clock = Clock(options.seconds)
    result: dict[str, Any] = {"environment": environment(bench), "sections": {}}
    console = Console(width=200)
    for name in options.sections:
        section, share = SECTIONS[name]
        rows: Rows = []
        start = time.monotonic()
        console.print(f"{name} …")
        try:
            facts = section(bench, clock.share(share), rows)
        except Exception:  # the other sections still have something to say
            facts = {"failed": traceback.format_exc()}
            console.print(facts["failed"], markup=False)
        result["sections"][name] = {"seconds": time.monotonic() - start, "rows": rows, **facts}
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
        if rows:
            console.print(show_kernels(rows) if name == "kernels" else show(name, rows))
        console.print_json(
            json.dumps({key: value for key, value in facts.items() if key not in ("profiler", "failed")})
        )
    if any(isinstance(section.get("failed"), str) for section in result["sections"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
