r"""Bytes against quality and speed: a dense model in llama.cpp's formats beside pruned ones in this package's.

    python benchmarks/pareto.py DENSE --pruned balanced=PRUNED int4-fit=PRUNED-INT4 \
        --datasets wiki.test.tokens c4.txt --folder exports --json pareto.json --plot pareto.png

Each pruned model is exported with `--format onnx --kernels` in float16, int8 and int4 (those that are in `--folder`
already are taken as they are; one that was fitted to grids of 4 bits in int4 alone), the dense one and what was only
rounded without kernels in int8 and int4, and evaluated in ONNX Runtime, so that what the operators round is counted.
The dense model is also quantised by llama.cpp (llama-cpp-python), restored, and evaluated in torch: what llama.cpp does
to activations is not counted. Bytes are those of all weights, which a decode step reads: of the exports the data file,
of GGUF files their tensors. Both store a tied head once.

Then all of them decode greedily in turn, in ONNX Runtime and llama.cpp, for each number of threads: medians over
interleaved rounds, of which the first is warm-up.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from cpu_decode import generations, show
from ending import exit_after
from llama_cpp_model import LlamaCpp, quantised, read_gguf, write_gguf

import gblm_compress
from gblm_compress.exporters.onnx import DATA
from gblm_compress.machine import environment
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.methods.patterns import DENSE
from gblm_compress.models import manifest
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.grids import read_grids
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress

FORMATS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "IQ3_S", "Q3_K_S", "Q2_K")
PROMPT, GENERATE = 128, 64
PACKED: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16", "kernels": True},
    "int8": {"quantise": "int8", "kernels": True},
    "int4": {"quantise": "int4", "kernels": True},
}
BLOCKS: dict[str, dict[str, Any]] = {"int8": {"quantise": "int8"}, "int4": {"quantise": "int4"}}
"""The ways to export a pruned model, and one without zeros on ONNX Runtime's own operator."""
Open = Callable[[int], AbstractContextManager[Any]]
"""From a number of threads to a runtime, until it is left."""


def of_llama_cpp(
    dense: ModelSource, formats: list[str], scratch: Path, judge: Any
) -> list[tuple[dict[str, Any], Open]]:
    """A row for each of the formats, and for float16, with what runs it."""
    rows: list[tuple[dict[str, Any], Open]] = []
    plain = write_gguf(load_model(dense, "float32"), "float16", scratch / "plain.gguf")
    for format in ("F16", *formats):
        path = plain if format == "F16" else quantised(plain, format, scratch / f"{format}.gguf")
        size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
        quality = judge(read_gguf(path, load_model(dense, "float32")), processor=load_processor(dense))
        row = {"model": "dense, llama.cpp", "weights": format, "MB": size / 1e6, **quality}
        rows.append((row, partial(_open_gguf, path)))
    return rows


def of_exports(
    name: str, model: ModelSource, ways: dict[str, dict[str, Any]], folder: Path, judge: Any
) -> list[tuple[dict[str, Any], Open]]:
    """A row for each of the ways to export that keeps what the model was fitted to, with what runs it."""
    grids = read_grids(model)
    fours = bool(grids) and len(next(iter(grids.values())).levels) == 16
    rows: list[tuple[dict[str, Any], Open]] = []
    for weights, settings in ways.items():
        if grids and weights != ("int4" if fours else "int8"):
            continue
        target = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{weights}"
        if not target.exists():
            gblm_compress.export(model.folder, target, format="onnx", **settings)
        row = {"model": name, "weights": weights, "MB": (target / DATA).stat().st_size / 1e6, **judge(target)}
        rows.append((row, partial(_open_export, ModelSource(name, target))))
    return rows


def _open_gguf(path: Path, threads: int) -> AbstractContextManager[Any]:
    return closing(LlamaCpp(path, threads, PROMPT + GENERATE))


def _open_export(source: ModelSource, threads: int) -> AbstractContextManager[Any]:
    return nullcontext(OnnxRuntime(source, "cpu", threads))


def time_(rows: list[tuple[dict[str, Any], Open]], threads: int, rounds: int) -> None:
    """Add to each row what a decode step takes, all of them in turn."""
    ids = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        runtimes = {str(index): stack.enter_context(opened(threads)) for index, (_, opened) in enumerate(rows)}
        times, _ = generations(runtimes, ids, rounds, GENERATE)
    for index, (row, _) in enumerate(rows):
        row[f"ms/token, threads={threads}"] = times[str(index)][1]


def draw(rows: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    """Perplexity over megabytes, a panel for each text and a line for each model."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(texts), figsize=(6.5 * len(texts), 5), layout="constrained", squeeze=False)
    for text, axes in zip(texts, panels[0], strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            own = sorted((row for row in rows if row["model"] == name), key=lambda row: row["MB"])
            axes.plot([row["MB"] for row in own], [row[text] for row in own], "o-", label=name)
            for row in own:
                axes.annotate(
                    row["weights"], (row["MB"], row[text]), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
        axes.set(title=text, xlabel="weights, MB", ylabel="perplexity", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.grid(which="both", alpha=0.2)
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Export, evaluate, time, print a table; write JSON and plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("--pruned", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="of llama.cpp")
    parser.add_argument("--folder", type=Path, required=True, help="where the exports are, or will be")
    parser.add_argument("--datasets", nargs="+", default=["wikitext2", "c4"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    silence_libraries()
    dense = resolve_model(options.dense, Progress(quiet=True))

    texts = [Path(name).name for name in options.datasets]

    def judge(model: Any, **of_model: Any) -> dict[str, float | None]:
        size = {"sequence_length": options.length, "max_windows": options.windows, "dtype": "float32"}
        row: dict[str, float | None] = {}
        for dataset, text in zip(options.datasets, texts, strict=True):
            found = gblm_compress.evaluate(
                model, dataset=dataset, device="cpu", quiet=True, baseline=dense.folder, **size, **of_model
            )
            perplexity, fidelity = found.metrics["perplexity"], found.fidelity or {}
            row |= {text: perplexity.value, f"{text}, error": perplexity.error, f"{text}, KL": fidelity["mean_kl"]}
        return row

    with tempfile.TemporaryDirectory() as scratch:
        found = of_llama_cpp(dense, options.formats, Path(scratch), judge)
        found += of_exports("dense, ONNX Runtime", dense, BLOCKS, options.folder, judge)
        for named in options.pruned:
            name, _, folder = named.partition("=")
            model = ModelSource(name, Path(folder))
            has_zeros = manifest.read(model.folder)["prune"]["pattern"] != DENSE
            found += of_exports(name, model, PACKED if has_zeros else BLOCKS, options.folder, judge)
        for threads in dict.fromkeys(options.threads):
            time_(found, threads, options.rounds)
    rows = [row for row, _ in found]
    show(f"perplexity of {options.windows} windows of {options.length} tokens of each text", rows)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    if options.plot:
        draw(rows, texts, options.plot)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    exit_after(main)
