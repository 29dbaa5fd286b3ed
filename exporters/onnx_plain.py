"""The plain ONNX graph of a decoder, by transformers' exporter: any family that can be traced, one node an operation.

Only `graph_of` and `_trace` know the exporter, which is experimental.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir

from gblm_compress.errors import ModelError
from gblm_compress.exporters.onnx_slim import slim_
from gblm_compress.measure.onnx_runtime import STATE
from gblm_compress.models.architecture import cache_kinds, sliding_windows
from gblm_compress.models.config_keys import HEADS, POSITIONS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks import task_of

# Names of the dynamic dimensions; None is a fixed one.
_DIMENSIONS: dict[str, list[str | None]] = {
    "input_ids": ["batch_size", "sequence_length"],
    "position_ids": ["batch_size", "sequence_length"],
    "attention_mask": ["batch_size", "total_sequence_length"],
    "logits": ["batch_size", "sequence_length", None],
}
_CACHE_NAME = re.compile(r"(input|output)\.\w+\.layers\.(\d+)\.(keys|values|conv_states|recurrent_states)(?:\.(\d+))?")
_PARTS = {"keys": "key", "values": "value", "conv_states": "conv_state", "recurrent_states": "recurrent_state"}
"""The parts of a layer's cache, and how onnxruntime-genai calls them."""
_WINDOW_NAME = re.compile(r"(input|output)\.\w+\.layers\.(\d+)\._sliding_window_tensor")
_GENAI_STATES = ("lfm2",)
"""Families with states beside keys and values that onnxruntime-genai 0.18 runs; it finds them by `layer_types`."""
_UNLIMITED = 1 << 20
"""The context length of a model whose positions have no limit, as attention by distance has none."""

_KINDS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
"""The classes of caches that come out as keys and values, as states of convolutions and recurrences, or not at all."""


def check(source: ModelSource, config: Any) -> None:
    """Raises:
    ModelError: the model's cache has more than keys, values and states.
    """
    if kinds := cache_kinds(config) - _KINDS:
        raise _not_plain(source, ", ".join(sorted(kinds)))


def build(model: Any, source: ModelSource) -> tuple[ir.Model, dict[str, Any] | None]:
    """Trace the model.

    Returns:
        The graph and its `genai_config.json`; None where onnxruntime-genai does not know what to do with its states.

    Raises:
        ModelError: transformers' exporter does not manage the architecture.
    """
    program = _trace(model, source)
    slim_(program)
    _fold_windows_(program, model.config)
    _name_cache(program, source)
    if not any((value.name or "").startswith("past_key_values.") for value in program.graph.inputs):
        raise ModelError(
            f"{source.name!r}: the graph that transformers' exporter makes of {type(model).__name__} has no cache; "
            "export to a sparse PyTorch format"
        )
    _name_dimensions(program)
    return program, genai_config(program, model.config)


def _trace(model: Any, source: ModelSource) -> ir.Model:
    """The graph that transformers' exporter makes of the decode step with any number of tokens."""
    with tracing(model, source):
        from transformers.exporters.utils import decompose_for_generation

        inputs = dict(task_of(type(model)).example(model.config))
        stages = decompose_for_generation(model, inputs, multi_token_decode=True)
        return graph_of(*stages["decode"])


def graph_of(module: Any, inputs: dict[str, Any], axes: int | None = None) -> ir.Model:
    """The graph that transformers' exporter makes of a module; within `tracing`.

    Args:
        axes: how many of the first dimensions of every input vary; all dimensions of all inputs if None.
    """
    from torch.export import Dim
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    varying = None if axes is None else {name: dict.fromkeys(range(axes), Dim.AUTO) for name in inputs}
    exported = OnnxExporter().export(module, inputs, OnnxConfig(dynamic=True, dynamic_shapes=varying))
    # transformers 5.17 returns torch's ONNXProgram, later releases a wrapper of their own
    return exported.program if hasattr(exported, "program") else exported.model


@contextmanager
def tracing(model: Any, source: ModelSource) -> Iterator[None]:
    """Raises:
    ModelError: for whatever the exporter raises within the `with`.
    """
    try:
        with _quiet_tracer():
            yield
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


def _fold_windows_(program: ir.Model, config: Any) -> None:
    """Make the width of sliding windows, which the cache brings along, the constant that it is.

    The graph's cache keeps all tokens, and its masks hide those that are outside the window.
    """
    layers, graph = sliding_windows(config), program.graph
    for value in list(graph.inputs):
        if match := _WINDOW_NAME.fullmatch(value.name or ""):
            graph.inputs.remove(value)
            value.const_value = ir.tensor(np.array(layers[int(match[2])], np.int64), name=value.name)
            graph.register_initializer(value)
    for value in list(graph.outputs):
        if _WINDOW_NAME.fullmatch(value.name or ""):
            graph.outputs.remove(value)


def _name_cache(program: ir.Model, source: ModelSource) -> None:
    """Give the cache the names that optimum and onnxruntime-genai expect.

    Raises:
        ModelError: the graph has inputs or outputs that these clients do not know.
    """
    for value in (*program.graph.inputs, *program.graph.outputs):
        if match := _CACHE_NAME.fullmatch(value.name or ""):
            direction, layer, kind, number = match.groups()
            stem = "past_key_values" if direction == "input" else "present"
            value.name = f"{stem}.{layer}.{_PARTS[kind]}" + (f"_{number}" if int(number or 0) else "")
        elif value.name not in _DIMENSIONS:
            raise _not_plain(source, value.name)


def _not_plain(source: ModelSource, what: str | None) -> ModelError:
    return ModelError(
        f"{source.name!r}: its cache has {what} beside keys, values and states, for which ONNX exports have no inputs "
        "and outputs; export to a sparse PyTorch format"
    )


def _name_dimensions(program: ir.Model) -> None:
    """Name the dynamic dimensions by meaning and make those of the cache that are fixed plain numbers."""
    for value in (*program.graph.inputs, *program.graph.outputs):
        assert value.name is not None and value.shape is not None
        if STATE.search(value.name):
            wanted = ["batch_size", *(None for _ in value.shape[1:])]
        elif value.name.startswith("past_key_values."):
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


def genai_config(program: ir.Model, config: Any) -> dict[str, Any] | None:
    """The `genai_config.json` with which onnxruntime-genai runs the folder; None where it does not know the states.

    Head count and size are read off the graph's own cache inputs, the rest off the model's config.
    """
    config = config.get_text_config()
    cache = [name for value in program.graph.inputs if (name := value.name or "").startswith("past_key_values.")]
    has_states = any(map(STATE.search, cache))
    if has_states and config.model_type not in _GENAI_STATES:
        return None
    keys = next(value for value in program.graph.inputs if (value.name or "").endswith(".key"))
    assert keys.shape is not None
    _, kv_heads, _, head_size = keys.shape
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    present = {value.name for value in program.graph.inputs}
    length = first_of(config, POSITIONS) or _UNLIMITED
    end = getattr(config, "eos_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    return {
        "model": {
            "type": config.model_type,
            "bos_token_id": getattr(config, "bos_token_id", None),
            "eos_token_id": end,
            "pad_token_id": pad if pad is not None else end,
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": int(head_size),
                "hidden_size": first_of(config, WIDTHS),
                "num_attention_heads": first_of(config, HEADS),
                "num_hidden_layers": len({name.split(".")[1] for name in cache}),
                **({"layer_types": config.layer_types} if has_states else {}),
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
            "max_length": min(length, 2048),
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
