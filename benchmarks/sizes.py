"""Zeros in the engines that people run: one pruned model, packed beside dense, in one process and one run.

    python benchmarks/engines.py PRUNED DENSE --folder exports --json result.json
    python benchmarks/engines.py --random 1b --folder exports --dtypes float16 --prompt 256 --generate 16 --rounds 3

Exports fused ONNX graphs of both models, with weights in float32 and float16 and as levels of 8 and 4 bits (those that
are in `--folder` already are taken as they are), and times them in ONNX Runtime and onnxruntime-genai, beside llama.cpp
at the same precision (Q8_0 in 8 bits, Q4_0 in 4) where its package (llama-cpp-python) is installed: a decode step of
one sequence and of several, and the prefill of a prompt.
Medians over interleaved rounds; the first is warm-up. Then a decode step of each graph is profiled by operator.
All weights of one dtype are in memory together.

With `--random` the models are made in `--folder` too: a Llama of random float16 weights, too large for any cache, and
the same one with half of every row zero, by magnitude.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from cpu_decode import generations, show
from ending import exit_after
from llama_cpp_model import LlamaCpp, write_gguf
from random_llama import PRESETS, write_random_llama

from gblm_compress.api import prune
from gblm_compress.exporters import export
from gblm_compress.kernels import cpu
from gblm_compress.machine import environment
from gblm_compress.measure.runtimes import load_runtime
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings

GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense float32": ("dense", {"dtype": "float32"}),
    "packed float32": ("pruned", {"dtype": "float32", "kernels": True}),
    "dense float16": ("dense", {"dtype": "float16", "kernels": True}),
    "packed float16": ("pruned", {"dtype": "float16", "kernels": True}),
    "dense int8": ("dense", {"quantise": "int8"}),
    "packed int8": ("pruned", {"quantise": "int8", "kernels": True}),
    "dense int4": ("dense", {"quantise": "int4"}),
    "packed int4": ("pruned", {"quantise": "int4", "kernels": True}),
}
"""Each graph's model and export settings. ONNX Runtime has no fast float16 on x86, so that dense float16 weights run on
this package's dense operator, as the packed model's head does. Dense weights of 8 and 4 bits run on ONNX Runtime's own
MatMulNBits."""
DTYPES = tuple(dict.fromkeys(name.split()[1] for name in GRAPHS))


def random_models(preset: str, folder: Path) -> dict[str, ModelSource]:
    """A random Llama and the pruned one, made where they are not in `folder`."""
    models = {name: ModelSource(name, folder / f"{name}-model") for name in ("dense", "pruned")}
    if not models["dense"].folder.exists():
        write_random_llama(models["dense"].folder, PRESETS[preset], "float16")
    if not models["pruned"].folder.exists():
        prune(models["dense"].folder, models["pruned"].folder, method="magnitude", fit="none")
    return models


def exported(models: dict[str, ModelSource], folder: Path, dtype: str) -> dict[str, ModelSource]:
    """The graphs with weights of a dtype, made where they are not in `folder`."""
    found = {}
    for name, (model, settings) in GRAPHS.items():
        if name.split()[1] != dtype:
            continue
        target = folder / name.replace(" ", "-")
        if not target.exists():
            export(models[model], target, ExportSettings(format="onnx", **settings), progress=Progress())
        found[name] = ModelSource(name, target)
    return found


@contextmanager
def contenders(
    graphs: dict[str, ModelSource], dense: ModelSource, dtype: str, threads: int, longest: int
) -> Iterator[dict[str, Any]]:
    """All engines that are timed with weights of a dtype, by engine and weights."""
    found: dict[str, Any] = {}
    for runtime in ("onnxruntime", "genai"):
        for name, source in graphs.items():
            found[f"{runtime} {name}"] = load_runtime(source, "auto", "cpu", threads, runtime=runtime)
    with tempfile.TemporaryDirectory() as scratch:
        if not find_spec("llama_cpp"):
            yield found
            return
        path = write_gguf(
            load_model(dense, dtype if dtype.startswith("float") else "float32"), dtype, Path(scratch) / "dense.gguf"
        )
        with closing(LlamaCpp(path, threads, longest)) as llama:
            yield {**found, f"llama.cpp dense {dtype}": llama}


def profile(source: ModelSource, threads: int, past: int = 128, steps: int = 30) -> dict[str, float]:
    """Milliseconds of a decode step after `past` tokens by operator, as ONNX Runtime records them, and between them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.register_custom_ops_library(str(cpu.onnxruntime_library()))
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch) / "step")
        session = onnxruntime.InferenceSession(
            source.folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        step = {"input_ids": np.array([[1]]), "attention_mask": np.ones((1, past + 1), np.int64)}
        for value in session.get_inputs():
            if value.name not in step:
                step[value.name] = np.zeros((1, value.shape[1], past, value.shape[3]), np.float32)
        for _ in range(steps):
            session.run(["logits"], step)
        events = json.loads(Path(session.end_profiling()).read_text())
    runs: list[Counter[str]] = [Counter()]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1][event["args"]["op_name"]] += event["dur"]
        elif event["name"] == "model_run":
            runs[-1]["whole"] = event["dur"]
            runs.append(Counter())
    names = set().union(*runs[2:-1])
    spent = {name: median(run[name] for run in runs[2:-1]) / 1000 for name in names}
    spent["between operators"] = 2 * spent["whole"] - sum(spent.values())
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def compared(
    graphs: dict[str, ModelSource], dense: ModelSource, dtype: str, threads: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each engine and its weights of a dtype."""
    ids = torch.randint(0, 1000, (options.parallel, options.prompt), generator=torch.Generator().manual_seed(0))
    with contenders(graphs, dense, dtype, threads, options.prompt + options.generate + 1) as runtimes:
        one, _ = generations(runtimes, ids[:1], options.rounds, options.generate)
        several = {name: runtime for name, runtime in runtimes.items() if not isinstance(runtime, LlamaCpp)}
        many, _ = generations(several, ids[:, :64], options.rounds, options.generate)
    rows = []
    for name, (prefill, decode) in one.items():
        engine, kind, _ = name.split()
        rivals = {"dense": one.get(f"{engine} dense {dtype}"), "llama.cpp": one.get(f"llama.cpp dense {dtype}")}
        dense_many = many.get(f"{engine} dense {dtype}")
        rows.append(
            {
                "engine": engine,
                "weights": f"{kind} {dtype}",
                "threads": threads,
                "MB": graphs[f"{kind} {dtype}"].bytes_on_disk / 1e6 if engine != "llama.cpp" else None,
                "ms_per_token": decode,
                "prefill_ms": prefill,
                f"ms_per_step_of_{options.parallel}": many[name][1] if name in many else None,
                "decode_over_dense": rivals["dense"] and rivals["dense"][1] / decode,
                "prefill_over_dense": rivals["dense"] and rivals["dense"][0] / prefill,
                "parallel_over_dense": dense_many[1] / many[name][1] if dense_many and name in many else None,
                "decode_over_llama.cpp": rivals["llama.cpp"] and rivals["llama.cpp"][1] / decode,
            }
        )
    return rows


def main() -> None:
    """Export, time, profile; print tables and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", nargs="?", help="a pruned folder")
    parser.add_argument("dense", nargs="?", help="the dense model that it was made from")
    parser.add_argument("--random", choices=PRESETS, help="models with random weights of this size, in place of both")
    parser.add_argument("--folder", type=Path, required=True, help="where the exports are, or will be")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=4, help="sequences decoded together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.random is None) != (options.dense is not None):
        parser.error("give PRUNED and DENSE, or --random alone")
    silence_libraries()
    if options.random:
        models = random_models(options.random, options.folder)
    else:
        models = {name: resolve_model(getattr(options, name), Progress(quiet=True)) for name in ("pruned", "dense")}
    result: dict[str, Any] = {"environment": environment(), "rows": [], "profiles": []}
    for dtype in options.dtypes:
        graphs = exported(models, options.folder, dtype)
        for threads in options.threads:
            result["rows"] += compared(graphs, models["dense"], dtype, threads, options)
            for name, source in graphs.items():
                result["profiles"].append({"weights": name, "threads": threads, "ms": profile(source, threads)})
    show(f"prompt of {options.prompt}, then {options.generate} greedy tokens", result["rows"])
    for entry in result["profiles"]:
        parts = list(entry["ms"].items())[:7]
        print(f"{entry['weights']}, {entry['threads']} threads, ms:", ", ".join(f"{n} {v:.2f}" for n, v in parts))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    exit_after(main)
