"""Export to ONNX: one graph for prefill and decode, verified in ONNX Runtime against torch.

The folder loads in onnxruntime alone, in optimum's `ORTModelForCausalLM` (names of inputs and outputs) and in
onnxruntime-genai (`genai_config.json`). Only `_trace` knows transformers' exporter, which is experimental.
"""

import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.exporters import check_is_pruned, dtype_of
from gblm_compress.exporters.onnx_bitmask import decode, encode_initializers_, use_kernels_
from gblm_compress.exporters.verification import real_sample
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import WORD
from gblm_compress.layouts.bitmask import BitmaskLinear
from gblm_compress.measure.runtimes import OnnxRuntime, Runtime, TorchRuntime
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import folders, outputs
from gblm_compress.tasks import task_of

GRAPH, DATA = "model.onnx", "model.onnx.data"
# Largest difference of a logit, relative to the largest logit: rounding through all layers, not per operation.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
PROMPT_TOKENS = 16
GREEDY_TOKENS = 32

_LOADING = """\
import onnxruntime

session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")"""
_LOADING_KERNELS = """\
import gblm_compress
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(gblm_compress.onnxruntime_library()))
session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx", options)"""

# Names of the dynamic dimensions; None is a fixed one.
_DIMENSIONS: dict[str, list[str | None]] = {
    "input_ids": ["batch_size", "sequence_length"],
    "position_ids": ["batch_size", "sequence_length"],
    "attention_mask": ["batch_size", "total_sequence_length"],
    "logits": ["batch_size", "sequence_length", None],
}
_CACHE_NAME = re.compile(r"(input|output)\.\w+\.layers\.(\d+)\.(keys|values)")


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None) -> None:
    """Raises:
    UsageError: the model's task has no ONNX export, or `kernels` are in another dtype than float32.
    MissingDependencyError: `kernels` without the compiled operator.
    ModelError: the model's cache is no plain KV cache, or `kernels` do not run the width of a layer.
    """
    from transformers import DynamicCache

    if settings.kernels:
        cpu.onnxruntime_library()
    if source is None:
        return
    skeleton = loading.load_skeleton(source)
    loading.task_of(source).example(skeleton.config)
    if kinds := {type(layer).__name__ for layer in DynamicCache(config=skeleton.config).layers} - {"DynamicLayer"}:
        raise _not_plain(source, ", ".join(sorted(kinds)))
    if settings.kernels:
        if (dtype := dtype_of(source, settings)) != "float32":
            raise UsageError(f"kernels run in float32; this model is exported in {dtype}: give dtype float32")
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
            `kernels`, they are also multiplied so.

    Raises:
        UsageError, MissingDependencyError: as `check`, or the output is in the way.
        ModelError: transformers' exporter does not manage the architecture.
        VerificationError: ONNX Runtime's logits or weights are not torch's, at once or decoded through the cache.
    """
    dtype = dtype_of(source, settings)
    model = loading.load_model(source, dtype)
    tokenizer = loading.load_tokenizer(source)
    layers = manifest.pruned_layers(source, model)
    if settings.sparse or settings.kernels:
        check_is_pruned({name: weight_matrix(model.get_submodule(name)).detach() for name in layers}, BitmaskLinear)
    wider = getattr(torch, dtype).itemsize / getattr(torch, loading.stored_dtype(source)).itemsize
    outputs.check_space(output, int(source.bytes_on_disk * wider), "the export")
    progress.say(f"tracing {type(model).__name__} (about a minute per 30 blocks) …")
    program = _trace(model, source)
    _name_cache(program, source)
    _name_dimensions(program)
    weights = _name_weights(program, model)
    pruned = [weights[layer] for layer in layers if layer in weights]
    if settings.sparse:
        encode_initializers_(program, pruned)
    elif settings.kernels:
        use_kernels_(program, pruned)
    with folders.atomic_folder(output, force=force) as temporary:
        progress.say("saving …")
        ir.save(program, temporary / GRAPH, external_data=DATA)
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        loading.save_tokenizer(tokenizer, temporary)
        (temporary / "genai_config.json").write_text(json.dumps(genai_config(program, model.config), indent=2) + "\n")
        progress.say("verifying in ONNX Runtime …")
        checks = _verify(temporary, model, tokenizer, dtype, layers, weights)
        how = _LOADING_KERNELS if settings.kernels else _LOADING
        manifest.write_export(
            temporary, source=source, format=settings.format, dtype=dtype, library="onnx", loading=how, checks=checks
        )
    return checks


def _trace(model: Any, source: ModelSource) -> ir.Model:
    """The graph that transformers' exporter makes of the decode step with any number of tokens."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    inputs = dict(task_of(type(model)).example(model.config))
    try:
        with _quiet_tracer():
            stages = decompose_for_generation(model, inputs, multi_token_decode=True)
            decoder, example = stages["decode"]
            exported = OnnxExporter().export(decoder, example, OnnxConfig(dynamic=True))
            # transformers 5.17 returns torch's ONNXProgram, later releases a wrapper of their own
            return exported.program if hasattr(exported, "program") else exported.model
    except Exception as error:  # anything that an experimental exporter and the tracers below it can raise
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{source.name!r}: transformers' ONNX exporter does not manage {type(model).__name__} ({reason})"
        ) from error


@contextmanager
def _quiet_tracer() -> Iterator[None]:
    """Silence what tracing prints and logs about its own insides; errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _name_cache(program: ir.Model, source: ModelSource) -> None:
    """Give the KV cache the names that optimum and onnxruntime-genai expect.

    Raises:
        ModelError: the graph has inputs or outputs that these clients do not know.
    """
    for value in (*program.graph.inputs, *program.graph.outputs):
        if match := _CACHE_NAME.fullmatch(value.name or ""):
            direction, layer, kind = match.groups()
            stem = "past_key_values" if direction == "input" else "present"
            value.name = f"{stem}.{layer}.{'key' if kind == 'keys' else 'value'}"
        elif value.name not in _DIMENSIONS:
            raise _not_plain(source, value.name)


def _not_plain(source: ModelSource, what: str | None) -> ModelError:
    return ModelError(
        f"{source.name!r}: its cache has {what}, which is no part of a plain KV cache; models with a sliding-window or "
        "recurrent cache cannot be exported to ONNX yet (a window that is never reached can be switched off with "
        '"sliding_window": null in config.json)'
    )


def _name_dimensions(program: ir.Model) -> None:
    """Name the dynamic dimensions by meaning and make those of the cache that are fixed plain numbers."""
    for value in (*program.graph.inputs, *program.graph.outputs):
        assert value.name is not None and value.shape is not None
        if value.name.startswith("past_key_values."):
            wanted = ["batch_size", None, "past_sequence_length", None]
        elif value.name.startswith("present."):
            wanted = ["batch_size", None, "total_sequence_length", None]
        else:
            wanted = _DIMENSIONS[value.name]
        dimensions = [
            name if name is not None else int(str(dimension))
            for name, dimension in zip(wanted, value.shape, strict=True)
        ]
        value.shape = ir.Shape(dimensions)


def _name_weights(program: ir.Model, model: nn.Module) -> dict[str, str]:
    """Rename the initializers that hold linear weights after their layer; the optimizer numbered some of them.

    An initializer is recognised by its content: the weight, or its transpose, bit for bit.

    Returns:
        {layer name: initializer name}.
    """
    by_content: dict[bytes, str] = {}
    for name, layer in ((n, layer) for block in prunable_layers(model) for n, layer in block.items()):
        weight = weight_matrix(layer).detach()
        for array in (weight.numpy(), weight.T.numpy()):
            by_content.setdefault(_content(array), name)
    initializers = program.graph.initializers
    found = {}
    for value in list(initializers.values()):
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        layer_name = by_content.get(_content(value.const_value.numpy()))
        if layer_name is not None and layer_name not in found:
            found[layer_name] = f"{layer_name}.weight"
            if value.name != found[layer_name]:
                initializers.pop(value.name)
                value.name = found[layer_name]
                initializers[value.name] = value
    return found


def _content(array: Any) -> bytes:
    shape = repr(array.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).digest()


def genai_config(program: ir.Model, config: Any) -> dict[str, Any]:
    """The `genai_config.json` with which onnxruntime-genai runs the folder.

    Head count and size are read off the graph's own cache inputs, the rest off the model's config.
    """
    cache = [value for value in program.graph.inputs if (value.name or "").startswith("past_key_values.")]
    assert cache[0].shape is not None
    _, kv_heads, _, head_size = cache[0].shape
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    present = {value.name for value in program.graph.inputs}
    return {
        "model": {
            "type": config.model_type,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                "head_size": int(head_size),
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(cache) // 2,
                "num_key_value_heads": int(kv_heads),
                "inputs": {
                    **{name: name for name in inputs if name in present},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(config.max_position_embeddings, 2048),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _verify(
    folder: Path, model: Any, tokenizer: Any, dtype: str, layers: list[str], weights: dict[str, str]
) -> dict[str, Any]:
    """Reopen the folder in ONNX Runtime and compare it with torch on real text."""
    zeros = _verify_zeros(folder, model, layers, weights)
    sample = real_sample(model, tokenizer)
    reference = TorchRuntime(model)
    runtime = OnnxRuntime(ModelSource(str(folder), folder), "cpu", torch.get_num_threads())
    at_once = _check_logits(reference.predict(sample)[0], runtime.predict(sample)[0], dtype, "read at once")
    expected, got = _decode_side_by_side(reference, runtime, sample["input_ids"][:, :PROMPT_TOKENS])
    one_by_one = _check_logits(expected, got, dtype, "decoded one by one")
    # Where torch's two largest logits are further apart than twice the largest difference, no error of that size turns
    # the choice; of two that are nearer either may win. An export whose errors leave nothing decided is of no use.
    largest = expected.topk(2).values
    decided = int((largest[:, 0] - largest[:, 1] > 2 * (expected - got).abs().max()).sum())
    if not decided:
        raise VerificationError(
            f"logits of ONNX Runtime and torch differ by {one_by_one:.2e} of the largest logit, more than the choice "
            f"of any of {GREEDY_TOKENS} tokens bears; export in float32"
        )
    return {
        "logits_relative_difference": max(at_once, one_by_one),
        "logits_tolerance": TOLERANCE[dtype],
        "greedy_tokens": GREEDY_TOKENS,
        "decided_greedy_tokens": decided,
        "identical_greedy_tokens": int((expected.argmax(-1) == got.argmax(-1)).sum()),
        "dtype": dtype,
        "provider": runtime.provider,
        **zeros,
    }


def _decode_side_by_side(reference: Runtime, runtime: Runtime, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [GREEDY_TOKENS, vocabulary] of both, step by step through their KV caches, both fed the tokens that the
    reference chooses: so that every step can be compared, whatever the other would have chosen before."""
    ids, cache, other_cache = prompt, None, None
    expected, got = [], []
    for _ in range(GREEDY_TOKENS):
        logits, cache = reference.last_logits(ids, cache)
        other, other_cache = runtime.last_logits(ids, other_cache)
        expected.append(logits[0])
        got.append(other[0])
        ids = logits.argmax(-1, keepdim=True)
    return torch.stack(expected), torch.stack(got)


def _check_logits(expected: Tensor, got: Tensor, dtype: str, how: str) -> float:
    """The largest difference relative to the largest logit.

    Raises:
        VerificationError: it is more than the dtype allows.
    """
    difference = float((expected - got).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise VerificationError(
            f"logits of ONNX Runtime and torch differ by {difference:.2e} of the largest logit on {len(expected)} "
            f"tokens {how}; {TOLERANCE[dtype]:.0e} is allowed in {dtype}"
        )
    return difference


def _verify_zeros(folder: Path, model: nn.Module, layers: list[str], weights: dict[str, str]) -> dict[str, int]:
    """Count the zeros of every pruned layer's initializer, as saved, against the layer."""
    initializers = ir.load(folder / GRAPH).graph.initializers
    total = 0
    for layer in layers:
        weight = weight_matrix(model.get_submodule(layer)).detach()
        expected = int((weight == 0).sum())
        if layer not in weights:
            raise VerificationError(f"{layer}: no initializer of the graph holds its weight")
        got = int((decode(initializers, weights[layer]) == 0).sum())
        if got != expected:
            raise VerificationError(f"{layer}: {expected} zeros in the model, {got} in the graph's initializer")
        total += got
    return {"layers_checked": len(layers), "zeros": total}
