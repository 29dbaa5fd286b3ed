"""What pruning costs: time and memory, beside the paper's own procedure, over sizes and methods, against the GEMM.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/prune.py --json result.json --plot result.png

reference  SmolLM2-135M by `gblm-compress prune` and by `reference_gblm.py`, in turn: time, peak memory, equal masks.
blocks     Llamas of random weights with ever more blocks of one size, streamed, hidden states in files: does peak
           memory depend on their number?
large      a Llama of 1.1B parameters, streamed: peak memory against the bytes of its checkpoint.
methods    time by method, calibration samples, tokens in a sample and size of the model; straight lines through it.
gemm       the floating-point operations that GBLM cannot do without, timed as bare products of the model's own shapes
           in this run: what share of the time of the whole command they are.

Every measurement is a process of its own. It imports the libraries and stops itself; the time is from when it is let go
on until it has ended, and includes loading, reading text, saving and verifying. Peak memory is the kernel's high-water
mark of the resident set (VmHWM, reset at that point, read every 20 ms) less the resident set at that point, so less
interpreter and libraries. It counts pages of memory-mapped files; the private part alone (RssAnon, the highest of the
same readings, less its value at that point) is given beside it. The processor time of each process tells how far it had
its core for itself. Linux only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from ending import exit_after
from random_llama import PRESETS, Shape, write_random
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from gblm_compress.machine import environment
from gblm_compress.models.checkpoint import read_tensors
from gblm_compress.models.files import weight_files
from gblm_compress.models.finding import resolve_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress

Rows = list[dict[str, Any]]
SAMPLE_EVERY_S = 0.02

# In the child: every library that either side comes to import, then a stop until the parent says to go on.
START = """
import os, runpy, signal, sys
import datasets, optimum.exporters.tasks, pydoc_data.topics
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
import gblm_compress.cli.app, gblm_compress.pruning
os.kill(os.getpid(), signal.SIGSTOP)
if sys.argv[1].endswith(".py"):
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    gblm_compress.cli.app.main()
"""


@dataclass(frozen=True)
class Size:
    """What is measured at full and at toy size.

    `calibrations` are pairs of samples and tokens in each; every product is repeated for `product_seconds`.
    """

    model: str
    samples: int
    length: int
    shape: Shape
    blocks: tuple[int, ...]
    large: Shape
    large_samples: int
    calibrations: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    width_blocks: int
    product_seconds: float


FULL = Size(
    model="demo",
    samples=32,
    length=512,
    shape=Shape(hidden=1024, intermediate=2816, blocks=8, heads=16, kv_heads=4, vocabulary=8192),
    blocks=(8, 16, 32),
    large=PRESETS["tinyllama-1.1b"],
    large_samples=16,
    calibrations=((4, 512), (8, 512), (16, 512), (8, 128), (8, 1024)),
    widths=(512, 1024, 1536, 2048),
    width_blocks=4,
    product_seconds=0.3,
)
TOY = Size(
    model="tiny",
    samples=4,
    length=64,
    shape=Shape(hidden=64, intermediate=128, blocks=2, heads=4, kv_heads=2, vocabulary=512),
    blocks=(1, 2, 3),
    large=Shape(hidden=128, intermediate=256, blocks=3, heads=4, kv_heads=2, vocabulary=512),
    large_samples=4,
    calibrations=((2, 32), (4, 32)),
    widths=(64, 128),
    width_blocks=1,
    product_seconds=0,
)


@dataclass(frozen=True)
class Cost:
    """What a process took from when its libraries were loaded."""

    seconds: float
    processor_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def measured(arguments: list[str]) -> Cost:
    """Run `gblm-compress` with these arguments, or a script with its own, in a process of its own."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", START, *arguments], stdout=log, stderr=subprocess.STDOUT)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        status_file = Path(f"/proc/{process.pid}/status")
        if os.WIFSTOPPED(status):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets VmHWM
            before = memory(status_file)
            peak = before
            used_before = processor_seconds(process.pid)
            start = time.perf_counter()
            os.kill(process.pid, signal.SIGCONT)
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                now = memory(status_file)
                peak = {key: max(peak[key], now.get(key, 0)) for key in peak}
                time.sleep(SAMPLE_EVERY_S)
            seconds = time.perf_counter() - start
            _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(arguments)}\nended with {process.returncode}:\n{log.read()[-3000:]}")
    return Cost(
        seconds=seconds,
        processor_seconds=usage.ru_utime + usage.ru_stime - used_before,
        peak_rss_bytes=peak["VmHWM"] - before["VmRSS"],
        peak_anonymous_bytes=peak["RssAnon"] - before["RssAnon"],
    )


def memory(status: Path) -> dict[str, int]:
    """VmHWM, VmRSS and RssAnon of a process in bytes; nothing once it has ended."""
    fields = (line.split() for line in status.read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in fields if line[0] in ("VmHWM:", "VmRSS:", "RssAnon:")}


def processor_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """The sizes, a folder for models and outputs, and the two programs that are measured."""

    def __init__(self, size: Size, work: Path, rounds: int, console: Console) -> None:
        self.size, self.work, self.rounds, self.console = size, work, rounds, console
        self.output = work / "pruned"

    def ours(self, model: str, samples: int, length: int, *options: str) -> Cost:
        """`gblm-compress prune`, 2:4; streamed if `options` say so. Its folder is `self.output` until the next run."""
        text = ["--calibration", "demo", "--samples", str(samples), "--sequence-length", str(length)]
        command = [
            "prune",
            model,
            "-o",
            str(self.output),
            "--pattern",
            "2:4",
            "--fit",
            "none",
            *text,
            "--device",
            "cpu",
            "--force",
            "--quiet",
            *options,
        ]
        return self._told(command, measured(command))

    def reference(self, model: str, samples: int, length: int, folder: Path) -> Cost:
        """`reference_gblm.py`, 2:4; its masks are then in the folder. Writing them is not in its seconds."""
        script = Path(__file__).with_name("reference_gblm.py")
        text = ["--calibration", "demo", "--samples", str(samples), "--sequence-length", str(length)]
        files = ["--masks", str(folder / "masks.safetensors"), "--json", str(folder / "cost.json")]
        command = [str(script), model, "--pattern", "2:4", *text, *files]
        seconds = measured(command)
        own = json.loads((folder / "cost.json").read_text())["seconds"]
        return self._told(command, replace(seconds, seconds=own))

    def random_model(self, shape: Shape) -> Path:
        """A folder of random weights in bf16, made once."""
        folder = self.work / "-".join(["llama", *(str(value) for value in asdict(shape).values())])
        if not folder.exists():
            write_random(folder, shape.config())
        return folder

    def _told(self, command: list[str], cost: Cost) -> Cost:
        took = f"{cost.seconds:.1f} s ({cost.processor_seconds:.1f} s of processor)"
        memory = f"{cost.peak_rss_bytes / 1e6:,.0f} MB, {cost.peak_anonymous_bytes / 1e6:,.0f} MB private"
        self.console.print(f"  {took}, {memory}: {' '.join(command)}", highlight=False, soft_wrap=True)
        return cost


STREAMED = ("--memory", "256MiB")  # so little that the model and hidden states are in files
BFLOAT16 = ("--dtype", "bfloat16")


def reference(bench: Bench) -> dict[str, Any]:
    """Ours in either place and dtype beside the paper's procedure in float32, in turn."""
    size = bench.size
    text = (size.model, size.samples, size.length)
    ways: dict[str, Callable[[], Cost]] = {"reference": partial(bench.reference, *text, bench.work)}
    ways |= {
        f"ours, {place}, {dtype}": partial(bench.ours, *text, "--dtype", dtype, *options)
        for place, options in (("in memory", ()), ("streamed", STREAMED))
        for dtype in ("float32", "bfloat16")
    }
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    agreement = {}
    dense = resolve_model(size.model, Progress(quiet=True)).folder
    for _ in range(bench.rounds):
        for name, run in ways.items():
            costs[name].append(run())
            if name != "reference":
                agreement[name] = mask_agreement(bench.output, bench.work / "masks.safetensors", dense)
    typical = {name: median_cost(values) for name, values in costs.items()}
    base = typical["reference"]
    rows = [
        {
            "execution": name,
            **asdict(cost),
            "seconds_of_rounds": [one.seconds for one in costs[name]],
            "times_faster": base.seconds / cost.seconds,
            "share_of_reference_memory": cost.peak_rss_bytes / base.peak_rss_bytes,
            "mask_agreement": agreement.get(name),
        }
        for name, cost in typical.items()
    ]
    return {"model": size.model, "samples": size.samples, "sequence_length": size.length, "rows": rows}


def median_cost(costs: list[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(*(median(values) for values in zip(*(asdict(cost).values() for cost in costs), strict=True)))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's files, by name."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_tensors(path).items()}


def mask_agreement(pruned: Path, masks: Path, dense: Path) -> float:
    """The share of all weights of pruned layers on which a pruned folder and a file of masks agree.

    A weight that is zero in the dense model is left out: nobody sees whether it was kept.
    """
    same = total = 0
    pruned_weights, dense_weights = tensors(pruned), tensors(dense)
    with safe_open(masks, "pt") as expected:
        for name in expected.keys():  # noqa: SIM118  (not a dict)
            key, known = f"{name}.weight", dense_weights[f"{name}.weight"] != 0
            agree = ((pruned_weights[key] != 0) == expected.get_tensor(name)) & known
            same, total = same + int(agree.sum()), total + int(known.sum())
    return same / total


def blocks(bench: Bench) -> dict[str, Any]:
    """Peak memory and time over the number of blocks, streamed."""
    rows = []
    for count in bench.size.blocks:
        shape = replace(bench.size.shape, blocks=count)
        model = bench.random_model(shape)
        cost = bench.ours(str(model), bench.size.large_samples, bench.size.length, *STREAMED, *BFLOAT16)
        rows.append({"blocks": count, "checkpoint_bytes": ModelSource("", model).bytes_on_disk, **asdict(cost)})
    counts = [row["blocks"] for row in rows]
    fits = {key: line(counts, [row[key] for row in rows]) for key in ("seconds", "peak_rss_bytes")}
    calibration = {"samples": bench.size.large_samples, "sequence_length": bench.size.length}
    return {"shape": asdict(bench.size.shape), **calibration, "rows": rows, "per_block": fits}


def large(bench: Bench) -> dict[str, Any]:
    """Peak memory of a model of 1.1B parameters against the bytes of its checkpoint, streamed."""
    model = bench.random_model(bench.size.large)
    checkpoint = ModelSource("", model).bytes_on_disk
    cost = bench.ours(str(model), bench.size.large_samples, bench.size.length, *STREAMED, *BFLOAT16)
    share = cost.peak_rss_bytes / checkpoint
    row = {"blocks": bench.size.large.blocks, "checkpoint_bytes": checkpoint, **asdict(cost)}
    rows = [row | {"share_of_checkpoint": share}]
    calibration = {"samples": bench.size.large_samples, "sequence_length": bench.size.length}
    return {"shape": asdict(bench.size.large), **calibration, "rows": rows}


def methods(bench: Bench) -> dict[str, Any]:
    """Seconds by method over samples, tokens in a sample, and size; and straight lines through them."""
    size = bench.size
    rows: Rows = []

    def add(method: str, model: str, samples: int, length: int, weights: int) -> None:
        cost = bench.ours(model, samples, length, "--method", method)
        row = {"method": method, "weights": weights, "samples": samples, "sequence_length": length}
        rows.append(row | {"tokens": samples * length} | asdict(cost))

    weights = pruned_weights(resolve_model(size.model, Progress(quiet=True)))
    add("magnitude", size.model, *size.calibrations[0], weights)
    for method in ("wanda", "gblm"):
        for samples, length in size.calibrations:
            add(method, size.model, samples, length, weights)
    calibrated = len(rows)
    shared_length = [row for row in rows if row["sequence_length"] == size.calibrations[0][1]]
    for width in size.widths:
        scale = width // size.shape.heads
        shape = replace(
            size.shape, hidden=width, intermediate=width * 11 // 4 // scale * scale, blocks=size.width_blocks
        )
        model = bench.random_model(shape)
        add("gblm", str(model), size.large_samples, size.length, pruned_weights(ModelSource("", model)))
    fits = {
        f"{method}, tokens": line(*columns([row for row in shared_length if row["method"] == method], "tokens"))
        for method in ("wanda", "gblm")
    }
    fits["gblm, pruned weights"] = line(*columns(rows[calibrated:], "weights"))
    return {"model": size.model, "rows": rows, "seconds_over": fits}


def columns(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """A column and the seconds beside it."""
    return [row[key] for row in rows], [row["seconds"] for row in rows]


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """The line of least squares y = start + slope·x, and the share of the variance of y that it explains."""
    slope, start = np.polyfit(x, y, 1)
    errors, spread = np.asarray(y) - (start + slope * np.asarray(x)), np.asarray(y) - np.mean(y)
    r2 = 1 - (errors @ errors) / (spread @ spread) if spread @ spread else 1.0
    return {"start": float(start), "slope": float(slope), "r2": float(r2), "points": len(x)}


def pruned_weights(source: ModelSource) -> int:
    """Weights of all linear layers in the blocks."""
    return source.config["num_hidden_layers"] * sum(rows * columns for rows, columns in shape_of(source).values())


def shape_of(source: ModelSource) -> dict[str, tuple[int, int]]:
    """{name: [out_features, in_features]} of the linear layers in a block of a Llama."""
    config = source.config
    return Shape(
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
    ).matrices()


def gemm(bench: Bench) -> dict[str, Any]:
    """Bare products of the model's shapes, and the share of the whole command's time that they would take.

    For pruned weights P and T tokens, the forward pass takes 2·P·T floating-point operations, the backward pass 4·P·T,
    and the two passes of each block while it is pruned 4·P·T. The head of V·H weights adds 2·V·H·T forward and as much
    backward, for the gradient of its input. Attention, norms, the loss, scores and masks are not counted.
    """
    size = bench.size
    source, tokens = resolve_model(size.model, Progress(quiet=True)), size.samples * size.length
    config, weights = source.config, pruned_weights(source)
    head = (config["vocab_size"], config["hidden_size"])
    products: Rows = []
    rows: Rows = []
    for dtype in ("float32", "bfloat16"):
        seconds = {"blocks": 0.0, "head": 0.0}
        for layer, (outputs, inputs) in {**shape_of(source), "head": head}.items():
            rates = gemm_rates(outputs, inputs, size.length, getattr(torch, dtype), size.product_seconds)
            products.append({"layer": layer, "shape": [outputs, inputs], "dtype": dtype, **rates})
            operations = 2 * outputs * inputs * tokens / 1e9
            if layer == "head":
                seconds["head"] = operations * (1 / rates["forward"] + 1 / rates["input_gradient"])
            else:
                once = 3 / rates["forward"] + 1 / rates["input_gradient"] + 1 / rates["weight_gradient"]
                seconds["blocks"] += config["num_hidden_layers"] * operations * once
        cost = bench.ours(size.model, size.samples, size.length, "--dtype", dtype)
        idle = bench.ours(size.model, size.samples, size.length, "--dtype", dtype, "--method", "magnitude")
        floor = seconds["blocks"] + seconds["head"]
        rows.append(
            {
                "model": size.model,
                "dtype": dtype,
                "tokens": tokens,
                "block_gflop": 10 * weights * tokens / 1e9,
                "head_gflop": 4 * head[0] * head[1] * tokens / 1e9,
                "gemm_gflop_per_second": 10 * weights * tokens / 1e9 / seconds["blocks"],
                "floor_seconds": floor,
                "of_it_head_seconds": seconds["head"],
                "seconds": cost.seconds,
                "processor_seconds": cost.processor_seconds,
                "magnitude_seconds": idle.seconds,
                "share_of_gemm": floor / cost.seconds,
                "share_of_gemm_less_magnitude": floor / (cost.seconds - idle.seconds),
            }
        )
    return {"rows": rows, "gflop_per_second": products}


def gemm_rates(outputs: int, inputs: int, tokens: int, dtype: torch.dtype, at_least_s: float) -> dict[str, float]:
    """GFLOP/s of y = x Wᵀ, of the gradient of x and of that of W."""
    x = torch.randn(tokens, inputs).to(dtype)
    y = torch.randn(tokens, outputs).to(dtype)
    w = torch.randn(outputs, inputs).to(dtype)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "forward": lambda: x @ w.T,
        "input_gradient": lambda: y @ w,
        "weight_gradient": lambda: y.T @ x,
    }
    return {
        name: 2 * outputs * inputs * tokens / 1e9 / call_seconds(call, at_least_s) for name, call in candidates.items()
    }


def call_seconds(call: Callable[[], Any], at_least_s: float, at_least_calls: int = 5) -> float:
    """The median over calls, the first dropped."""
    call()
    times: list[float] = []
    while sum(times) < at_least_s or len(times) < at_least_calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "reference": reference,
    "blocks": blocks,
    "large": large,
    "methods": methods,
    "gemm": gemm,
}


def show(title: str, rows: Rows) -> Table:
    """The rows as they are, bytes as megabytes."""
    names = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    table = Table(*(name.replace("_bytes", "_mb") for name in names), title=title)
    for row in rows:
        table.add_row(*(cell(row[name] / 1e6 if name.endswith("_bytes") else row[name]) for name in names))
    return table


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def draw(sections: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel for each section that was measured."""
    import matplotlib.pyplot as plt

    shown = [name for name in SECTIONS if name in sections]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(down, across, figsize=(5 * across, 3.8 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for name, axis in zip(shown, axes.flat, strict=False):
        rows = sections[name]["rows"]
        if name == "reference":
            labels = [row["execution"].removeprefix("ours, ").replace(", ", "\n") for row in rows]
            base = rows[0]
            for key, shift in (("seconds", -0.2), ("peak_rss_bytes", 0.2)):
                bars = axis.bar(
                    np.arange(len(rows)) + shift,
                    [row[key] / base[key] for row in rows],
                    0.38,
                    label={"seconds": "time", "peak_rss_bytes": "peak memory"}[key],
                )
                axis.bar_label(bars, fmt="%.2f")
            axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
            axis.set(title="beside the paper's procedure", ylabel="share of the reference", ylim=(0, 1.35))
            axis.set_xticks(range(len(rows)), labels)
            axis.legend(loc="upper right", ncols=2)
        elif name in ("blocks", "large"):
            labels = [str(row["blocks"]) for row in rows]
            for field, shift in (("checkpoint_bytes", -0.27), ("peak_rss_bytes", 0), ("peak_anonymous_bytes", 0.27)):
                label = field.removesuffix("_bytes").replace("_", " ").replace("rss", "resident set")
                axis.bar(np.arange(len(rows)) + shift, [row[field] / 1e6 for row in rows], 0.25, label=label)
            axis.set_xticks(range(len(rows)), labels)
            title = "streamed, by blocks" if name == "blocks" else "streamed, 1.1B parameters"
            axis.set(title=title, xlabel="blocks", ylabel="MB")
            axis.legend()
        elif name == "methods":
            length = rows[0]["sequence_length"]
            weights = rows[0]["weights"]
            for method in ("wanda", "gblm"):
                chosen = [
                    row
                    for row in rows
                    if (row["method"], row["weights"], row["sequence_length"]) == (method, weights, length)
                ]
                fit = sections[name]["seconds_over"][f"{method}, tokens"]
                x = np.array([0, max(row["tokens"] for row in chosen)])
                (drawn,) = axis.plot(x, fit["start"] + fit["slope"] * x, linewidth=0.8)
                axis.plot(*columns(chosen, "tokens"), "o", color=drawn.get_color(), label=method)
            axis.axhline(rows[0]["seconds"], color="grey", linewidth=0.8, label="magnitude")
            axis.set(title=f"time by method, {sections[name]['model']}", xlabel="tokens", ylabel="s", ylim=(0, None))
            axis.legend()
        else:
            labels = [f"{row['model']}\n{row['dtype']}" for row in rows]
            bars = axis.bar(labels, [100 * row["share_of_gemm"] for row in rows])
            axis.bar_label(bars, fmt="%.0f")
            axis.axhline(70, color="grey", linewidth=0.8, linestyle=":")
            axis.set(title="operations needed, at GEMM speed", ylabel="% of the command's time", ylim=(0, 100))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the sections; after each of them write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="of the section 'reference'")
    parser.add_argument("--toy", action="store_true", help="sizes that take seconds and show nothing but that it runs")
    parser.add_argument("--work", type=Path, help="folder for models and outputs, kept; 8 GB (default: temporary)")
    parser.add_argument("--json", type=Path, help="where the figures go; sections measured before stay in it")
    parser.add_argument("--plot", type=Path, help="where a picture of them goes")
    options = parser.parse_args()
    console = Console(width=200)
    here = {"environment": environment(), "threads": torch.get_num_threads(), "toy": options.toy}
    result: dict[str, Any] = here | {"sections": {}}
    if options.json and options.json.exists():
        earlier = json.loads(options.json.read_text())
        if any(earlier[key] != value for key, value in here.items()):
            raise SystemExit(f"{options.json} is of another machine, version or size; give another file")
        result = earlier
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(TOY if options.toy else FULL, options.work or Path(temporary), options.rounds, console)
        bench.work.mkdir(parents=True, exist_ok=True)
        for name in options.sections:
            console.print(f"{name} …")
            result["sections"][name] = SECTIONS[name](bench)
            console.print(show(name, result["sections"][name]["rows"]))
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        draw(result["sections"], options.plot)


if __name__ == "__main__":
    exit_after(main)
