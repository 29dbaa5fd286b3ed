"""Zeros in encoders and image classifiers, in the engines that people run: one forward pass, packed beside dense.

    python benchmarks/forward.py DENSE PRUNED [PRUNED...] --folder exports --batch 1 8 --tokens 128 --threads 1
    python benchmarks/forward.py --shape bert-base --folder exports --sparsities 0.5 0.7 0.8 0.9 --tokens 32 128
    python benchmarks/forward.py --shape vit-b-16 --folder exports --sparsities 0.5 --profile --json result.json

Exports ONNX graphs of all models (those that are in `--folder` already are taken as they are) and times them in one
process: torch, ONNX Runtime, and OpenVINO where its package (openvino) is installed, in 8 bits too with nncf. Inputs
are random tokens without padding, or random pixels. A figure is the median over interleaved rounds; the first round is
warm-up. Rows are added to those of `--json`, so that a large measurement can be made in pieces. `--profile` shows the
time of each kind of operator, so that one sees what is no product of weights.

With `--shape` the models are made in `--folder` too: one of random weights, and a copy for each of `--sparsities`, by
magnitude. `bert-tiny` and `vit-tiny` are for trying this script.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cpu_decode import PAUSE_S, show
from ending import exit_after
from sizes import GRAPHS, exported_once, store_rows, stored_rows
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from gblm_compress.api import prune
from gblm_compress.errors import UsageError
from gblm_compress.kernels import cpu
from gblm_compress.measure.runtimes import load_runtime
from gblm_compress.models import loading, manifest
from gblm_compress.models.files import GRAPH
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer
from gblm_compress.progress import Progress
from gblm_compress.storage.outputs import atomic_folder
from gblm_compress.tasks.task import Sample

LEAST_S = 0.2  # of repeated passes behind each timing
PROFILED = 6  # passes of a profile; the first does not count
KEYS = ("model", "engine", "weights", "of", "path", "threads")  # of a row


def config(kind: type, hidden: int, blocks: int, heads: int, **more: int) -> Any:
    """The config of a model of that size."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return kind(**sizes, num_hidden_layers=blocks, num_attention_heads=heads, **more)


_BERT = {"pad_token_id": VOCABULARY}  # behind the tokens of bytes
SHAPES = {
    "bert-base": config(BertConfig, 768, blocks=12, heads=12, **_BERT),
    "minilm": config(BertConfig, 384, blocks=6, heads=12, **_BERT),
    "bert-tiny": config(BertConfig, 64, blocks=2, heads=2, **_BERT),
    "vit-b-16": config(ViTConfig, 768, blocks=12, heads=12, image_size=224, patch_size=16, num_labels=1000),
    "vit-tiny": config(ViTConfig, 64, blocks=2, heads=2, image_size=32, patch_size=8, num_labels=10),
}


def write_random(shape: Any, folder: Path) -> None:
    """Write a model with random weights and its processor, as a folder of transformers."""
    torch.manual_seed(0)
    with atomic_folder(folder) as temporary:
        if isinstance(shape, BertConfig):
            BertModel(shape).save_pretrained(temporary)
            processor = byte_tokenizer()
            processor.add_special_tokens({"pad_token": "<pad>"})
        else:
            ViTForImageClassification(shape).save_pretrained(temporary)
            processor = ViTImageProcessorPil(size={"height": shape.image_size, "width": shape.image_size})
        loading.save_processor(processor, temporary)


def random_models(shape: str, sparsities: Sequence[float], folder: Path) -> dict[str, ModelSource]:
    """{name: model}, the dense one first; they are made where they are not in `folder`."""
    dense = folder / shape
    if not dense.exists():
        write_random(SHAPES[shape], dense)
    pruned = {folder / f"{shape}-{100 * sparsity:g}": sparsity for sparsity in sparsities}
    for target, sparsity in pruned.items():
        if not target.exists():
            prune(dense, target, method="magnitude", fit="none", sparsity=sparsity)
    return {path.name: ModelSource(path.name, path) for path in (dense, *pruned)}


def exported(models: dict[str, ModelSource], dtypes: Sequence[str], folder: Path) -> dict[tuple[str, str], ModelSource]:
    """{(weights, model): graph}: dense ones of the first model, packed ones of the others."""
    dense, *pruned = models
    weights = [(f"packed {dtype}", name) for name in pruned for dtype in dtypes]
    weights += [("dense int8", dense)] * ("int8" in dtypes)
    return {
        (kind, name): exported_once(models[name], folder / f"{name}-{kind.replace(' ', '-')}", GRAPHS[kind][1])
        for kind, name in [("dense float32", dense), *sorted(weights, key=lambda pair: pair[1] != dense)]
    }


class OpenVino:
    """OpenVINO on the graph of an export; in 8 bits by NNCF, if there are samples to quantise it with."""

    def __init__(self, source: ModelSource, threads: int, calibration: Sequence[Sample] = ()) -> None:
        import openvino

        model = openvino.Core().read_model(source.folder / GRAPH)
        if calibration:
            import nncf

            arrays = [{name: tensor.numpy() for name, tensor in sample.items()} for sample in calibration]
            model = nncf.quantize(model, nncf.Dataset(arrays), model_type=nncf.ModelType.TRANSFORMER)
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self._request, self._inputs = compiled.create_infer_request(), [value.any_name for value in compiled.inputs]

    def predict(self, sample: Sample) -> torch.Tensor:
        """The first output of the graph, which is the prediction of its task."""
        return torch.from_numpy(self._request.infer({name: sample[name].numpy() for name in self._inputs})[0])


def timed(engines: Mapping[Any, Callable[[Sample], Any]], sample: Sample, rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of a pass in each of the interleaved rounds after the first."""
    found: dict[Any, list[float]] = {key: [] for key in engines}
    for number in range(rounds + 1):
        for key, predict in engines.items():
            time.sleep(PAUSE_S)
            passes, start, seconds = 0, time.perf_counter(), 0.0
            while seconds < LEAST_S:
                predict(sample)
                passes, seconds = passes + 1, time.perf_counter() - start
            if number:
                found[key].append(1000 * seconds / passes)
    return found


def operator_ms(source: ModelSource, threads: int, sample: Sample) -> dict[str, float]:
    """{kind of operator: its milliseconds in a pass}, longest first: medians in a session that records them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if source.needs_operator:
        options.register_custom_ops_library(str(cpu.onnxruntime_library()))
    with TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(source.folder / GRAPH, options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, {value.name: sample[value.name].numpy() for value in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
    passes: list[Counter[str]] = [Counter()]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            passes[-1][event["args"]["op_name"]] += event["dur"] / 1000
        elif event["name"] == "model_run":  # comes after the operators of its pass
            passes.append(Counter())
    counted = passes[1:PROFILED]
    return dict(Counter({name: median(one[name] for one in counted) for name in counted[-1]}).most_common())


def compared(
    models: dict[str, ModelSource],
    graphs: dict[tuple[str, str], ModelSource],
    samples: dict[str, Sample],
    threads: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each engine and its weights."""
    dense, float32 = next(iter(models)), "dense float32"
    sources = {("torch", float32, dense): models[dense]}
    for package, weights in (("openvino", float32), ("nncf", "dense int8")):
        if find_spec("openvino") and find_spec(package) and weights.split()[1] in ("float32", *options.weights):
            sources["openvino", weights, dense] = graphs[float32, dense]
    sources |= {("onnxruntime", *key): graph for key, graph in graphs.items()}
    rows, engines = {}, {}
    for (engine, weights, of), source in sources.items():
        kind, dtype = weights.split()
        path = cpu.path(getattr(torch, dtype)) if kind == "packed" else ""
        row = dict(zip(KEYS, (options.model, engine, weights, of, path, threads), strict=True))
        row |= {"zeros": zeros_of(source) if kind == "packed" else 0.0, "MB": source.bytes_on_disk / 1e6}
        rows[engine, weights, of] = row | {"version": import_module(engine).__version__}
        if engine == "openvino":
            calibration = list(samples.values()) if dtype == "int8" else []
            engines[engine, weights, of] = OpenVino(source, threads, calibration).predict
        else:
            engines[engine, weights, of] = load_runtime(source, "float32", "cpu", threads).predict
    for label, sample in samples.items():
        expected = engines["torch", float32, dense](sample)
        for key in (key for key in engines if key[1] == float32):
            torch.testing.assert_close(engines[key](sample), expected, rtol=1e-3, atol=1e-3)
        measured = timed(engines, sample, options.rounds)
        ms = {key: median(values) for key, values in measured.items()}
        best, int8 = min(ms[key] for key in ms if key[1] == float32), ms.get(("onnxruntime", "dense int8", dense))
        for key, row in rows.items():
            row |= {f"ms_{label}": ms[key], f"range_{label}": [min(measured[key]), max(measured[key])]}
            row[f"{label}_over_dense_float32"] = best / ms[key]
            row[f"{label}_over_dense_int8"] = int8 / ms[key] if int8 else None
    for key, row in rows.items():
        if options.profile and row["engine"] == "onnxruntime":
            row |= {f"operator_ms_{label}": operator_ms(sources[key], threads, samples[label]) for label in samples}
    return list(rows.values())


def zeros_of(source: ModelSource) -> float:
    """The zeros of pruned layers, as a fraction of their weights."""
    layers = manifest.read(source.folder)["layers"].values()
    return 1 - sum(layer["nonzeros"] for layer in layers) / sum(math.prod(layer["shape"]) for layer in layers)


def show_all(rows: list[dict[str, Any]], label: str) -> None:
    """Print a table of a batch, and the operators that take at least a fiftieth of a profile."""
    cells = []
    for row in rows:
        ms = [f"{value:.4g}" for value in (row[f"ms_{label}"], *row[f"range_{label}"])]
        figures = {name: row[name] for name in ("engine", "weights", "of", "path", "zeros", "MB")}
        figures |= {"ms": ms[0], "least to most": f"{ms[1]} to {ms[2]}"}
        cells.append(figures | {name: row[f"{label}_{name}"] for name in ("over_dense_float32", "over_dense_int8")})
    show(f"{rows[0]['model']}, {label}, threads: {rows[0]['threads']}", cells)
    for row in rows:
        if parts := row.get(f"operator_ms_{label}"):
            large = {part: ms for part, ms in parts.items() if ms >= 0.02 * sum(parts.values())}
            large["others"] = sum(parts.values()) - sum(large.values())
            listed = ", ".join(f"{part} {ms:.3g}" for part, ms in large.items())
            print(f"{row['weights']} of {row['of']}, ms: {listed}")


def main() -> None:
    """Export, time, profile where asked; print tables and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="the dense model, and folders that were pruned from it")
    parser.add_argument("--shape", choices=SHAPES, help="models with random weights of this shape instead")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9], help="with --shape")
    parser.add_argument("--folder", type=Path, required=True, help="where the exports are, or will be")
    parser.add_argument("--weights", nargs="+", choices=("float32", "float16", "int8"), default=["float32", "int8"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="texts or images in a pass")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="of each text; images have their own size")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="the time of each kind of operator in ONNX Runtime")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if bool(options.models) == bool(options.shape) or len(options.models) == 1:
        parser.error("give DENSE and PRUNED, or --shape alone")
    silence_libraries()
    if options.shape:
        models = random_models(options.shape, options.sparsities, options.folder)
    else:
        found = [resolve_model(name, Progress(quiet=True)) for name in options.models]
        models = {Path(source.name).resolve().name: source for source in found}
        if len(models) < len(found):
            parser.error("two folders have one name, and so would their exports; rename one")
    dense, *pruned = models.values()
    options.model, task, settings = next(iter(models)), loading.task_of(dense), loading.config_of(dense)
    if task.generates:
        raise UsageError(f"{dense.name!r} is {task.help}; benchmarks/sizes.py measures how it decodes")
    for model in pruned:
        manifest.check_baseline(model, dense)
    samples: dict[str, Sample] = {}
    for batch in options.batch:
        for tokens in options.tokens:
            sample = task.timed(settings, batch, tokens, seed=0)
            samples["x".join(map(str, next(iter(sample.values())).shape[: task.varying_axes]))] = sample
    graphs = exported(models, options.weights, options.folder)
    rows = stored_rows(options.json, KEYS)
    for threads in sorted(set(options.threads)):
        new = compared(models, graphs, samples, threads, options)
        for label in samples:
            show_all(new, label)
        for row in new:
            key = tuple(row[name] for name in KEYS)
            rows[key] = rows.get(key, {}) | row
        store_rows(options.json, rows)


if __name__ == "__main__":
    exit_after(main)
