"""Zeros in the engines that people run, at the sizes that they run: packed beside dense, in one process and one run.

    python benchmarks/sizes.py --shape llama-3.2-1b --folder exports --dtypes int8 --threads 2 --json result.json
    python benchmarks/sizes.py --shape llama-3.1-8b --blocks 8 --folder exports --dtypes int4 --paths avx2 avx512
    python benchmarks/sizes.py PRUNED DENSE --folder exports --engines onnxruntime genai

Exports fused ONNX graphs of both models (those that are in `--folder` already are taken as they are) and times them
beside llama.cpp at the same precision, where its package (llama-cpp-python) is installed. Its own tool
makes its files: Q8_0 in 8 bits, Q4_0 and Q4_K_M in 4. Timed are decode steps of one sequence and of several after the
shortest prompt, and prompts. Medians over interleaved rounds; the first is warm-up. All weights of one dtype are in
memory together. Rows are added to those of `--json`, so that a large measurement can be made in pieces.

With `--shape` the models are made in `--folder` too: a Llama of random weights, and the same one with half of every row
zero, by magnitude. With `--blocks` it has fewer blocks than the real one.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import onnx
import torch
from cpu_decode import generations, show
from ending import exit_after
from llama_cpp_model import LlamaCpp, quantised, write_gguf
from random_llama import PRESETS, Shape, write_random

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
    "dense int8, own kernels": ("dense", {"quantise": "int8", "kernels": True}),
    "packed int8": ("pruned", {"quantise": "int8", "kernels": True}),
    "dense int4": ("dense", {"quantise": "int4"}),
    "packed int4": ("pruned", {"quantise": "int4", "kernels": True}),
}
"""Each graph's model and export settings. ONNX Runtime has no fast float16 on x86, so that dense float16 weights run on
this package's dense operator, as the packed model's head does. Dense weights of 8 and 4 bits run on ONNX Runtime's own
MatMulNBits, in 8 bits on this package's operator too, which shows what is due to zeros."""
DTYPE_OF = {name: name.replace(",", "").split()[1] for name in GRAPHS}
DTYPES = tuple(dict.fromkeys(DTYPE_OF.values()))
LLAMA_CPP = {"int8": {"int8": "Q8_0"}, "int4": {"int4": "Q4_0", "Q4_K_M": "Q4_K_M"}}
"""llama.cpp's formats of a dtype, by what their rows are called."""
KEYS = ("model", "engine", "weights", "path", "threads")  # of a row


def random_models(shape: Shape, folder: Path) -> dict[str, ModelSource]:
    """A random Llama and the pruned one, made where they are not in `folder`."""
    models = {name: ModelSource(name, folder / f"{name}-model") for name in ("dense", "pruned")}
    if not models["dense"].folder.exists():
        write_random(models["dense"].folder, shape.config(), "float16")
    if not models["pruned"].folder.exists():
        prune(models["dense"].folder, models["pruned"].folder, method="magnitude", fit="none")
    return models


def exported(models: dict[str, ModelSource], folder: Path, names: list[str]) -> dict[str, ModelSource]:
    """The graphs of these names, made where they are not in `folder`."""
    places = {name: folder / name.replace(",", "").replace(" ", "-") for name in names}
    return {name: exported_once(models[GRAPHS[name][0]], places[name], GRAPHS[name][1]) for name in names}


def exported_once(model: ModelSource, target: Path, settings: dict[str, Any]) -> ModelSource:
    """The ONNX export in `target`, made if it is not there."""
    if not target.exists():
        export(model, target, ExportSettings(format="onnx", **settings), progress=Progress())
    return ModelSource(target.name, target)


def stored_rows(path: Path | None, keys: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of an earlier run, by the values of `keys`; none without a file."""
    rows = json.loads(path.read_text())["rows"] if path and path.exists() else []
    return {tuple(row[key] for key in keys): row for row in rows}


def store_rows(path: Path | None, rows: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Write all rows, if there is a path to write to."""
    if path:
        path.write_text(json.dumps({"environment": environment(), "rows": list(rows.values())}, indent=2) + "\n")


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read: the best of 9 sums of 1 GiB."""
    torch.set_num_threads(threads)
    numbers, times = torch.ones(1 << 28), []
    for _ in range(9):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times)


def bytes_read(path: Path) -> int:
    """Bytes of a file that a decode step reads: all weights, but one row of the embedding and of rotary tables."""
    if path.suffix == ".gguf":
        sizes = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors}
        return int(sum(sizes.values()) - ("output.weight" in sizes) * sizes["token_embd.weight"])
    graph = onnx.load(path, load_external_data=False).graph
    by_row = ("Gather", "GatherBlockQuantized", "GroupQueryAttention")
    read = {name for node in graph.node if node.op_type not in by_row for name in node.input}
    return sum(
        next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), len(tensor.raw_data))
        for tensor in graph.initializer
        if tensor.name in read
    )


@contextmanager
def contenders(
    graphs: dict[str, ModelSource], dense: ModelSource, dtype: str, threads: int, options: argparse.Namespace
) -> Iterator[dict[tuple[str, str, str], tuple[Any, int]]]:
    """{(engine, weights, path): (runtime, `bytes_read`)} of all that is timed with weights of a dtype."""
    found: dict[tuple[str, str, str], tuple[Any, int]] = {}
    for engine in options.engines:
        for name, source in graphs.items():
            for path in options.paths if source.needs_operator else [""]:
                with patch.dict("os.environ", {cpu.PATH_VARIABLE: path} if path else {}):
                    runtime = load_runtime(source, "auto", "cpu", threads, runtime=engine)
                found[engine, name, path] = runtime, bytes_read(source.folder / "model.onnx")
    if not find_spec("llama_cpp"):
        yield found
        return
    with ExitStack() as stack:
        for format, path in gguf_files(dense, dtype, options.folder).items():
            llama = stack.enter_context(closing(LlamaCpp(path, threads, max(options.prompts) + options.generate + 1)))
            found["llama.cpp", f"dense {format}", ""] = llama, bytes_read(path)
        yield found


def gguf_files(dense: ModelSource, dtype: str, folder: Path) -> dict[str, Path]:
    """{what its row is called: file} for llama.cpp, made where they are not in `folder`."""
    plain = folder / f"{'float16' if dtype in LLAMA_CPP else dtype}.gguf"
    files = {name: folder / f"{format}.gguf" for name, format in LLAMA_CPP.get(dtype, {dtype: plain.stem}).items()}
    missing = [path for path in files.values() if not path.exists()]
    if missing and not plain.exists():
        write_gguf(load_model(dense, plain.stem), plain.stem, plain)
    for path in missing:
        if path != plain:
            quantised(plain, path.stem, path)
    return files


def compared(
    graphs: dict[str, ModelSource], dense: ModelSource, dtype: str, threads: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each engine, its weights of a dtype, and each path of the kernels."""
    ids = torch.randint(0, 1000, (options.parallel, max(options.prompts)), generator=torch.Generator().manual_seed(0))
    fastest, shortest = bandwidth(threads), min(options.prompts)
    with contenders(graphs, dense, dtype, threads, options) as found:
        runtimes = {key: runtime for key, (runtime, _) in found.items()}
        several = {key: runtime for key, runtime in runtimes.items() if not isinstance(runtime, LlamaCpp)}
        parallel, _ = generations(several, ids[:, :shortest], options.rounds, options.generate)
        times: dict[str, dict[Any, float]] = {f"step_of_{options.parallel}": {k: v[1] for k, v in parallel.items()}}
        for prompt in sorted(options.prompts):
            generate = options.generate if prompt == shortest else 2
            one, _ = generations(runtimes, ids[:1, :prompt], options.rounds, generate)
            times[f"prompt_of_{prompt}"] = {key: prefill for key, (prefill, _) in one.items()}
            if prompt == shortest:
                times["token"] = {key: decode for key, (_, decode) in one.items()}
    rows = []
    for (engine, weights, path), (_, size) in found.items():
        row = dict(zip(KEYS, (options.model, engine, weights, path, threads), strict=True))
        row |= {"MB_per_token": size / 1e6, "GB/s": size / times["token"][engine, weights, path] / 1e6}
        row |= {"bandwidth_GB/s": fastest / 1e9, "share_of_bandwidth": row["GB/s"] * 1e9 / fastest}
        for what, measured in times.items():
            own = row[f"ms_per_{what}"] = measured.get((engine, weights, path))
            for name, rival in (("dense", engine), ("llama.cpp", "llama.cpp")):
                same = (rival, f"dense {dtype}", path)
                other = measured.get(same, measured.get((rival, f"dense {dtype}", "")))
                row[f"{what}_over_{name}"] = other / own if own and other else None
        rows.append(row)
    return rows


def main() -> None:
    """Export, time, profile; print tables and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", nargs="?", help="a pruned folder")
    parser.add_argument("dense", nargs="?", help="the dense model that it was made from")
    parser.add_argument("--shape", choices=PRESETS, help="models with random weights of this shape, in place of both")
    parser.add_argument("--blocks", type=int, help="so many blocks of the shape")
    parser.add_argument("--folder", type=Path, required=True, help="where the exports are, or will be")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument(
        "--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS), help="those of the dtypes by default"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--engines", nargs="*", choices=("onnxruntime", "genai"), default=["onnxruntime"])
    parser.add_argument("--paths", nargs="+", default=[""], help="of the kernels; the best one by default")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=4, help="sequences decoded together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.shape is None) != (options.dense is not None):
        parser.error("give PRUNED and DENSE, or --shape alone")
    silence_libraries()
    if options.shape:
        shape = PRESETS[options.shape]
        blocks = options.blocks or shape.blocks
        options.model = options.shape if blocks == shape.blocks else f"{blocks} blocks of {options.shape}"
        options.folder /= options.model.replace(" ", "-")
        models = random_models(replace(shape, blocks=blocks), options.folder)
    else:
        models = {name: resolve_model(getattr(options, name), Progress(quiet=True)) for name in ("pruned", "dense")}
        options.model = models["dense"].name
    rows = stored_rows(options.json, KEYS)
    for dtype in options.dtypes:
        names = [name for name in options.graphs if DTYPE_OF[name] == dtype]
        graphs = exported(models, options.folder, names)
        for threads in options.threads:
            new = compared(graphs, models["dense"], dtype, threads, options)
            for name, source in graphs.items():
                parts = load_runtime(source, "auto", "cpu", threads, runtime="onnxruntime", profile=[1]).step_ms
                print(f"{name}, {threads} threads, ms:", ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items()))
            show("milliseconds, and how many times as fast", new)
            rows |= {tuple(row[key] for key in KEYS): row for row in new}
            store_rows(options.json, rows)


if __name__ == "__main__":
    exit_after(main)
