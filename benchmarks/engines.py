"""Zeros in the engines that people run: one pruned model, packed beside dense, in one process and one run.

    python benchmarks/engines.py PRUNED DENSE --folder exports --json result.json

Exports fused ONNX graphs of both models, with float32 and float16 weights (those that are in `--folder` already are
taken as they are), and times them in ONNX Runtime and onnxruntime-genai, beside llama.cpp at the same precision where
its package (llama-cpp-python) is installed: a decode step of one sequence and of several, and the prefill of a prompt.
Medians over interleaved rounds; the first is warm-up. Then a decode step of each graph is profiled by operator.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from cpu_decode import show
from llama_cpp_model import LlamaCpp, write_gguf

from gblm_compress.exporters import export
from gblm_compress.kernels import cpu
from gblm_compress.machine.environment import environment
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
}
"""Each graph's model and export settings. ONNX Runtime has no fast float16 on x86, so that dense float16 weights run on
this package's dense operator, as the packed model's head does."""


def exported(models: dict[str, ModelSource], folder: Path) -> dict[str, ModelSource]:
    """The graphs, made where they are not in `folder`."""
    found = {}
    for name, (model, settings) in GRAPHS.items():
        target = folder / name.replace(" ", "-")
        if not target.exists():
            export(models[model], target, ExportSettings(format="onnx", **settings), progress=Progress())
        found[name] = ModelSource(name, target)
    return found


@contextmanager
def contenders(
    graphs: dict[str, ModelSource], dense: ModelSource, threads: int, longest: int
) -> Iterator[dict[str, Any]]:
    """Everything that is timed, by engine and weights."""
    found: dict[str, Any] = {}
    for runtime in ("onnxruntime", "genai"):
        for name, source in graphs.items():
            found[f"{runtime} {name}"] = load_runtime(source, "auto", "cpu", threads, runtime=runtime)
    with tempfile.TemporaryDirectory() as scratch:
        llamas = []
        for dtype in ("float32", "float16") if find_spec("llama_cpp") else ():
            path = write_gguf(load_model(dense, "float32"), dtype, Path(scratch) / f"{dtype}.gguf")
            llamas.append(LlamaCpp(path, threads, longest))
            found[f"llama.cpp dense {dtype}"] = llamas[-1]
        try:
            yield found
        finally:
            for llama in llamas:
                llama.close()


def timed(runtimes: dict[str, Any], ids: torch.Tensor, generate: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of the prefill of `ids` and of a decode step after it, in interleaved rounds."""
    prefill: dict[str, list[float]] = {name: [] for name in runtimes}
    decode: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(rounds + 1):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            token, cache = runtime.prefill(ids)
            first = time.perf_counter()
            for _ in range(generate):
                token, cache = runtime.decode(token, cache)
            end = time.perf_counter()
            if number:
                prefill[name].append(1000 * (first - start))
                decode[name].append(1000 * (end - first) / generate)
    return {name: (median(prefill[name]), median(decode[name])) for name in runtimes}


def profile(source: ModelSource, threads: int, past: int = 128, steps: int = 30) -> dict[str, float]:
    """Milliseconds of a decode step after `past` tokens by operator, as ONNX Runtime records them, and between them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.register_custom_ops_library(str(cpu.onnxruntime_library()))
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch) / "step")
        session = onnxruntime.InferenceSession(source.folder / "model.onnx", options)
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


def main() -> None:
    """Export, time, profile; print tables and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="a pruned folder")
    parser.add_argument("dense", help="the dense model that it was made from")
    parser.add_argument("--folder", type=Path, required=True, help="where the exports are, or will be")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=4, help="sequences decoded together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    silence_libraries()
    models = {name: resolve_model(getattr(options, name), Progress(quiet=True)) for name in ("pruned", "dense")}
    graphs = exported(models, options.folder)
    result: dict[str, Any] = {"environment": environment(), "rows": [], "profiles": []}
    ids = torch.randint(0, 1000, (options.parallel, options.prompt), generator=torch.Generator().manual_seed(0))
    for threads in options.threads:
        with contenders(graphs, models["dense"], threads, options.prompt + options.generate + 1) as runtimes:
            one = timed(runtimes, ids[:1], options.generate, options.rounds)
            several = {name: runtime for name, runtime in runtimes.items() if not isinstance(runtime, LlamaCpp)}
            many = timed(several, ids[:, :64], options.generate, options.rounds)
        for name, (prefill, decode) in one.items():
            engine, kind, dtype = name.split()
            rivals = {"dense": one.get(f"{engine} dense {dtype}"), "llama.cpp": one.get(f"llama.cpp dense {dtype}")}
            result["rows"].append(
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
                    "parallel_over_dense": many[f"{engine} dense {dtype}"][1] / many[name][1] if name in many else None,
                    "decode_over_llama.cpp": rivals["llama.cpp"] and rivals["llama.cpp"][1] / decode,
                }
            )
        for name, source in graphs.items():
            result["profiles"].append({"weights": name, "threads": threads, "ms": profile(source, threads)})
    show(f"prompt of {options.prompt}, then {options.generate} greedy tokens", result["rows"])
    for entry in result["profiles"]:
        parts = list(entry["ms"].items())[:7]
        print(f"{entry['weights']}, {entry['threads']} threads, ms:", ", ".join(f"{n} {v:.2f}" for n, v in parts))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
