"""Export to ONNX: one graph for prefill and decode, verified in ONNX Runtime against torch.

The graph is fused (`onnx_fused`) or plain (`onnx_plain`). The folder loads in onnxruntime and in onnxruntime-genai. A
plain one also loads in optimum's `ORTModelForCausalLM`. Models that do not generate have a graph of one forward pass.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from gblm_compress.calibration.weights import StreamedWeights
from gblm_compress.errors import ModelError, UsageError, first_line, is_out_of_memory
from gblm_compress.exporters import (
    check_is_pruned,
    check_nonzeros,
    drop_signs_of_zeros_,
    dtype_of,
    onnx_fused,
    onnx_plain,
    onnx_weights,
)
from gblm_compress.exporters.onnx_packing import use_kernels_
from gblm_compress.exporters.onnx_rounding import Rounded, by_channels, packer, round_, use_nbits_
from gblm_compress.exporters.onnx_verification import verify
from gblm_compress.formats import MOST_NONZEROS
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import WORD
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import outputs

DATA = GRAPH + ".data"
# For programs without Python, and for onnxruntime-genai, which loads a library from the model's folder.
LIBRARY = "gblm_onnxruntime" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LENGTHEN = 5  # A graph with a recurrence is verified on more tokens than a chunk has.

_LOADING = """\
import onnxruntime

session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")"""
_LOADING_KERNELS = """\
import gblm_compress
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(gblm_compress.onnxruntime_library()))
session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx", options)"""


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None) -> None:
    """Refuse tasks without such a graph, missing operators, and layers whose width `kernels` do not run."""
    if settings.kernels:
        cpu.onnxruntime_library()
    if source is None:
        return
    skeleton = loading.load_skeleton(source)
    task = loading.task_of(source)
    task.example(skeleton.config)
    if settings.group and by_channels(source, settings):
        raise UsageError("group would do nothing: int8 of a model without decoding has a scale for each row")
    if graph_of(skeleton, settings) == "plain":
        if task.generates:
            onnx_plain.check(source, skeleton.config)
    elif reason := onnx_fused.why_not(skeleton):
        raise ModelError(f"{source.name!r}: it has no fused graph, export with --graph plain; {reason}")
    if settings.kernels:
        for name in manifest.pruned_layers(source, skeleton) if patterns is None else patterns:
            if (width := weight_matrix(skeleton.get_submodule(name)).shape[1]) % WORD:
                raise ModelError(
                    f"{name}: in_features={width} is not a multiple of {WORD}, which kernels need; export without "
                    "--kernels"
                )


def bytes_a_weight(source: ModelSource, skeleton: Any, settings: ExportSettings) -> float:
    """Peak memory. With a fused graph: the weights as exported."""
    if graph_of(skeleton, settings) == "plain":
        return 17.0
    bits = {"int8": 9, "int4": 5}.get(settings.quantise or "", 8 * getattr(torch, dtype_of(source, settings)).itemsize)
    copied = settings.quantise and not settings.kernels  # by ONNX Runtime, in another order
    return bits / 8 * (2.2 if copied else 1.0)


def graph_of(model: nn.Module, settings: ExportSettings) -> str:
    return settings.graph or ("plain" if onnx_fused.why_not(model) else "fused")


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Write a folder of `model.onnx`, its data, processor and configs, verified in ONNX Runtime; returns the checks.

    If a fused graph by default cannot be made or run, a plain one takes its place, with the reason among the checks. A
    bfloat16 checkpoint becomes float32 by default: ONNX Runtime has no bfloat16 on the CPU. With
    `kernels`, float16 is the dtype of the weights alone, and layers without zeros run on the dense operator.
    """
    made = _made(source, settings, progress)
    try:
        return _write(made, output, force=force, progress=progress)
    except ModelError as error:
        if settings.graph or made.graph == "plain" or is_out_of_memory(error):
            raise
        reason = first_line(error)
    progress.say(f"a plain graph replaces the fused one: {reason}")
    made = _made(source, settings.model_copy(update={"graph": "plain"}), progress)
    checks = _write(made, output, force=force, progress=progress)
    return {"graph": "plain", "why_not_fused": reason, **checks}


@dataclass(frozen=True)
class _Made:
    """A model as the graph will hold it.

    Attributes:
        stored, dtype: of the weights, and of the arithmetic.
        layers: those that were pruned; with kernels, those that run packed.
        zeros: {one of them: the number of its zeros}.
        rounded: None without `quantise`.
    """

    source: ModelSource
    settings: ExportSettings
    graph: str
    stored: str
    dtype: str
    model: Any
    processor: Any
    layers: list[str]
    zeros: dict[str, int]
    rounded: Rounded | None


def _made(source: ModelSource, settings: ExportSettings, progress: Progress) -> _Made:
    """Load a model, check its zeros, and round it. For a fused graph, which needs no run, its matrices stay on disk."""
    stored, processor, rounded = dtype_of(source, settings), loading.load_processor(source), None
    dtype = "float32" if settings.kernels else stored
    model = loading.load_skeleton(source, dtype)
    if (graph := graph_of(model, settings)) == "plain":
        model = loading.load_model(source, stored)
    named = [(name, layer) for block in prunable_layers(model) for name, layer in block.items()]
    layers = manifest.pruned_layers(source, model)
    if graph == "fused":
        StreamedWeights(source, model, "cpu").attach_(getattr(torch, stored))
    else:
        drop_signs_of_zeros_(model, layers)
        model = model.to(getattr(torch, dtype))
    kept, sizes = {}, {}
    for name in progress.track(layers, "counting zeros", unit="layers"):
        weight = weight_matrix(model.get_submodule(name))
        kept[name], sizes[name] = count_nonzeros(weight), weight.numel()
    check_nonzeros(source, kept)
    if settings.kernels and not manifest.is_pruned(source.folder):  # from elsewhere: layers with enough zeros to gain
        layers = [name for name in layers if kept[name] <= MOST_NONZEROS * sizes[name]]
    if settings.kernels and layers:
        packed = {name: kept[name] for name in layers}
        check_is_pruned(packed, sum(sizes[name] for name in layers), getattr(torch, dtype).itemsize)
    if settings.quantise:
        pack = packer(source, settings, is_dense=not layers)
        rounded = round_(model, progress.track(named, "rounding", unit="layers"), pack, sizes)
        kept |= rounded.nonzeros
    zeros = {name: sizes[name] - kept[name] for name in layers}
    return _Made(source, settings, graph, stored, dtype, model, processor, layers, zeros, rounded)


def _write(made: _Made, output: Path, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Write the verified folder of a model; the checks."""
    source, settings, model, rounded = made.source, made.settings, made.model, made.rounded
    graph, stored, dtype, task = made.graph, made.stored, made.dtype, loading.task_of(made.source)
    wider = getattr(torch, dtype).itemsize / getattr(torch, loading.stored_dtype(source)).itemsize
    outputs.check_space(output, int(source.bytes_on_disk * wider), "the export")
    genai_config: dict[str, Any] | None
    with outputs.atomic_folder(output, force=force) as temporary:
        if graph == "fused":
            progress.say(f"building the fused graph of {type(model).__name__} …")
            program, places, genai_config = onnx_fused.build(model, made.processor, source, dtype)
        else:
            progress.say(f"tracing {type(model).__name__} (about a minute per 30 blocks) …")
            program, places, genai_config = onnx_plain.build(model, source)
        if rounded:
            merged = onnx_weights.stacked(rounded.layers, places)
            if settings.kernels:
                use_kernels_(program, list(merged), packed=merged, tables=rounded.tables)
            else:
                use_nbits_(program, merged, rounded.tables)
        elif settings.kernels:
            pruned = list(dict.fromkeys(places[layer].initializer for layer in made.layers if layer in places))
            use_kernels_(program, pruned, half=stored != dtype)
        progress.say("saving …")
        ir.save(program, temporary / GRAPH, external_data=DATA)
        if settings.kernels:
            shutil.copy(cpu.onnxruntime_library(), temporary / LIBRARY)
            if genai_config:
                genai_config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
        model.config.dtype = stored
        model.config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        loading.save_processor(made.processor, temporary, source)
        if genai_config:
            (temporary / "genai_config.json").write_text(json.dumps(genai_config, indent=2) + "\n")
        progress.say("verifying in ONNX Runtime …")
        recurs = any("recurrent_state" in (value.name or "") for value in program.graph.inputs)
        limit = onnx_plain.note_limit(temporary, source.name) if recurs else None
        sample = task.probe(made.processor, model.config)
        if recurs:
            sample = {**sample, "input_ids": sample["input_ids"].repeat(1, LENGTHEN)}
        exactness = ("levels" if settings.kernels else "blocks") if settings.quantise else dtype
        checks = {
            "graph": graph,
            "nodes": len(program.graph),
            **({"tokens_at_once": limit} if limit else {}),
            "dtype": stored,
            **({"weights": settings.quantise, **rounded.checks} if rounded else {}),
            "arithmetic": dtype,
            **verify(ModelSource(source.name, temporary), model, sample, exactness, made.zeros, places),
        }
        content = {"kind": "export", "format": settings.format, "dtype": stored, "checks": checks}
        loading_code = _LOADING_KERNELS if settings.kernels else _LOADING
        manifest.write(temporary, source, content, library="onnx", loading=loading_code)
    return checks
