"""Export to ONNX: one graph for prefill and decode, verified in ONNX Runtime against torch.

The graph is fused (`onnx_fused`) or plain (`onnx_plain`). The folder loads in onnxruntime alone and in
onnxruntime-genai (`genai_config.json`). A plain one also loads in optimum's `ORTModelForCausalLM`, by its names of
inputs and outputs. Models that generate nothing have a graph of one forward pass (`onnx_forward`).
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.exporters import (
    check_is_pruned,
    dtype_of,
    onnx_forward,
    onnx_fused,
    onnx_plain,
    onnx_rounding,
    onnx_weights,
    quantised,
)
from gblm_compress.exporters.onnx_bitmask import encode_initializers_
from gblm_compress.exporters.onnx_kernels import use_kernels_
from gblm_compress.exporters.onnx_limits import note_limit
from gblm_compress.exporters.onnx_nbits import use_nbits_
from gblm_compress.exporters.onnx_verification import verify
from gblm_compress.formats import FORMATS
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import WORD
from gblm_compress.layouts import LAYOUTS
from gblm_compress.measure.onnx_runtime import has_recurrence
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import outputs

GRAPH, DATA = "model.onnx", "model.onnx.data"
# For onnxruntime-genai, which loads a library from the model's folder, and for programs without Python.
LIBRARY = "gblm_onnxruntime" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

_LOADING = """\
import onnxruntime

session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")"""
LENGTHEN = 5
"""Graphs with a recurrence are held to so many times the text, which is more than a chunk."""

_LOADING_KERNELS = """\
import gblm_compress
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(gblm_compress.onnxruntime_library()))
session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx", options)"""


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None) -> None:
    """Raises:
    UsageError: the model's task has no ONNX export, or as `quantised.check`.
    MissingDependencyError: `kernels` without the compiled operator.
    ModelError: the graph that was asked for does not exist, or `kernels` do not run the width of a layer.
    """
    if settings.kernels:
        cpu.onnxruntime_library()
    quantised.check(source, settings)
    if source is None:
        return
    skeleton = loading.load_skeleton(source)
    loading.task_of(source).example(skeleton.config)
    generates = loading.task_of(source).generates
    if settings.quantise and not generates:
        raise UsageError("quantise is for causal language models; export to bitmask-int8 or with --kernels alone")
    if graph_of(skeleton, settings) == "plain":
        if generates:
            onnx_plain.check(source, skeleton.config)
    elif reason := onnx_fused.why_not(skeleton):
        raise ModelError(f"{source.name!r}: there is no fused graph of it, export with --graph plain; {reason}")
    if settings.kernels:
        for name in manifest.pruned_layers(source, skeleton) if patterns is None else patterns:
            if (width := weight_matrix(skeleton.get_submodule(name)).shape[1]) % WORD:
                raise ModelError(
                    f"{name}: in_features={width} is not a multiple of {WORD}, which kernels need; export with --sparse"
                )


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Write an ONNX folder: `model.onnx`, its data, tokenizer, config, generation config, `genai_config.json`.

    Args:
        settings: dtype "float32" or "float16"; "auto" takes the checkpoint's own, float32 for a bfloat16 one, since
            ONNX Runtime has no bfloat16 on the CPU. With `sparse`, the pruned layers' initializers are packed; with
            `kernels`, they are also multiplied so, and float16 is the dtype of the weights alone; a model that was
            never pruned runs on the dense operator. With `quantise`, weights are levels of 8 or 4 bits, without
            `kernels` blocks of ONNX Runtime; the model whose weights are so rounded is what is verified.

    Raises:
        UsageError, MissingDependencyError: as `check`, or the output is in the way.
        ModelError: transformers' exporter does not manage the architecture.
        VerificationError: ONNX Runtime's logits or weights are not torch's, at once or decoded through the cache.
    """
    task, stored = loading.task_of(source), dtype_of(source, settings)
    dtype = stored
    half = settings.kernels and stored == "float16"  # weights only: the arithmetic is float32
    model = loading.load_model(source, stored)
    if half:
        model, dtype = model.float(), "float32"
    processor = loading.load_processor(source)
    layers = manifest.pruned_layers(source, model)
    is_dense = settings.kernels and not manifest.is_pruned(source.folder)
    if is_dense:
        layers = []  # the dense model, on kernels of the same care
    weights = {name: weight_matrix(model.get_submodule(name)).detach() for name in layers}
    if layers and (settings.sparse or settings.kernels):
        check_is_pruned(weights, LAYOUTS["bitmask"].kind)
    rounded = onnx_rounding.round_(model, source, settings, is_dense=is_dense) if settings.quantise else None
    wider = getattr(torch, dtype).itemsize / getattr(torch, loading.stored_dtype(source)).itemsize
    graph = graph_of(model, settings)
    copies = 1 + (FORMATS[settings.format].copies if graph == "fused" else 0)
    outputs.check_space(output, int(source.bytes_on_disk * wider) * copies, "the export")
    with outputs.atomic_folder(output, force=force) as temporary:
        with TemporaryDirectory(dir=temporary) as scratch:  # what is built, and its weights until they are saved
            if graph == "fused":
                progress.say(f"building the fused graph of {type(model).__name__} …")
                program, genai_config = onnx_fused.build(model, processor, source, dtype, Path(scratch))
            else:
                progress.say(f"tracing {type(model).__name__} (about a minute per 30 blocks) …")
                program, genai_config = (onnx_plain if task.generates else onnx_forward).build(model, source)
            places = onnx_weights.find(program, model)
            pruned = list(dict.fromkeys(places[layer].initializer for layer in layers if layer in places))
            if settings.sparse:
                encode_initializers_(program, pruned)
            elif settings.kernels:
                if rounded:
                    merged = onnx_weights.stacked(rounded.layers, places)
                    use_kernels_(program, list(merged), packed=merged, tables=rounded.tables)
                else:
                    use_kernels_(program, pruned, half=half)
                shutil.copy(cpu.onnxruntime_library(), temporary / LIBRARY)
                if genai_config:
                    genai_config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
            elif rounded:
                use_nbits_(program, onnx_weights.stacked(rounded.layers, places), rounded.tables)
            progress.say("saving …")
            _save(temporary, program, genai_config, model, processor, source, stored)
        progress.say("verifying in ONNX Runtime …")
        recurs = has_recurrence(value.name or "" for value in program.graph.inputs)
        limit = note_limit(temporary, source.name) if recurs else None
        sample = task.probe(processor, model.config)
        if recurs:
            sample = {**sample, "input_ids": sample["input_ids"].repeat(1, LENGTHEN)}
        checks = {
            "graph": graph,
            "nodes": len(program.graph),
            **({"tokens_at_once": limit} if limit else {}),
            "dtype": stored,
            **({"weights": settings.quantise, **rounded.summary()} if rounded else {}),
            "arithmetic": dtype,
            **verify(temporary, model, sample, _exactness(settings, dtype), layers, places),
        }
        manifest.write_export(
            temporary,
            source=source,
            format=settings.format,
            dtype=stored,
            library="onnx",
            loading=_LOADING_KERNELS if settings.kernels else _LOADING,
            checks=checks,
        )
    return checks


def _exactness(settings: ExportSettings, dtype: str) -> str:
    """The entry of `TOLERANCE` that an export is held to."""
    if settings.quantise:
        return "levels" if settings.kernels else "blocks"
    return dtype


def _save(
    folder: Path,
    program: ir.Model,
    genai_config: dict[str, Any],
    model: Any,
    processor: Any,
    source: ModelSource,
    dtype: str,
) -> None:
    ir.save(program, folder / GRAPH, external_data=DATA)
    model.config.dtype = dtype  # of the weights
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    loading.save_processor(processor, folder, source)
    if genai_config:
        (folder / "genai_config.json").write_text(json.dumps(genai_config, indent=2) + "\n")


def graph_of(model: nn.Module, settings: ExportSettings) -> str:
    """The graph of an export: the one asked for, or else the fused one where there is one."""
    return settings.graph or ("plain" if onnx_fused.why_not(model) else "fused")
