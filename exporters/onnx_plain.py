"""The plain ONNX graph of any model that can be traced, by transformers' exporter: one node for each operation.

Names follow optimum and onnxruntime-genai. No other module knows the exporter, which is experimental.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from gblm_compress.errors import ModelError, translated
from gblm_compress.exporters.onnx_slim import slim_
from gblm_compress.exporters.onnx_weights import Place, find
from gblm_compress.measure.engines import GENAI_INPUTS, GENAI_OUTPUTS
from gblm_compress.measure.onnx_runtime import AT_ONCE, STATE, OnnxRuntime
from gblm_compress.models.architecture import cache_kinds
from gblm_compress.models.files import GRAPH, HEADS, POSITIONS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.printing import silenced
from gblm_compress.tasks import task_of

# Names of the dynamic dimensions; None is a fixed one.
_DIMENSIONS: dict[str, list[str | None]] = {
    "input_ids": ["batch_size", "sequence_length"],
    "position_ids": ["batch_size", "sequence_length"],
    "attention_mask": ["batch_size", "total_sequence_length"],
    "logits": ["batch_size", "sequence_length", None],
}
# The same without a cache, by number of dimensions.
_SEQUENCE, _IMAGE = ("batch_size", "sequence_length", "width"), ("batch_size", "num_channels", "height", "width")
_CACHE_NAME = re.compile(r"\w+\.\w+\.layers\.(\d+)\.(keys|values|conv_states|recurrent_states)(?:\.(\d+))?")
# {part of a layer's cache: its name in onnxruntime-genai}
_PARTS = {"keys": "key", "values": "value", "conv_states": "conv_state", "recurrent_states": "recurrent_state"}
_WINDOW_NAME = re.compile(r"(input|output)\.\w+\.layers\.(\d+)\._sliding_window_tensor")
_COUNTER = ".cumulative_length_linear"  # From transformers 5.25 on.
_GENAI_STATES = ("lfm2",)  # Families whose other states onnxruntime-genai 0.18 runs, by their `layer_types`.
_UNLIMITED = 1 << 20  # Context length of a model without a limit of positions.
# Classes of caches that the exporter can trace.
_KINDS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
# Possible numbers of tokens in a chunk of a recurrence; transformers' have 64 to 256.
CHUNKS = (16, 32, 64, 128, 256, 512)


def check(source: ModelSource, config: Any) -> None:
    """Refuse a model whose cache has more than keys, values and states."""
    if kinds := cache_kinds(config) - _KINDS:
        raise _not_plain(source, ", ".join(sorted(kinds)))


def build(model: Any, source: ModelSource) -> tuple[ir.Model, dict[str, Place], dict[str, Any] | None]:
    """The traced graph, where it has layers, and its `genai_config.json`; None if genai does not run the model."""
    if not task_of(type(model)).generates:
        program = _forward(model, source)
        return program, find(program, model), None
    program = _trace(model, source)
    _drop_counters_(program)
    _fold_windows_(program, model.config)
    _name_values_(program, source)
    if not any((value.name or "").startswith("past_key_values.") for value in program.graph.inputs):
        raise ModelError(
            f"{source.name!r}: the graph that transformers' exporter makes of {type(model).__name__} has no cache; "
            "export to a sparse PyTorch format"
        )
    return program, find(program, model), genai_config(program, model.config)


def _trace(model: Any, source: ModelSource) -> ir.Model:
    with _tracing(model, source):
        from transformers.exporters.utils import decompose_for_generation

        inputs = dict(task_of(type(model)).example(model.config))
        stages = decompose_for_generation(model, inputs, multi_token_decode=True)
        return _graph_of(*stages["decode"])


def _forward(model: Any, source: ModelSource) -> ir.Model:
    task = task_of(type(model))
    with _tracing(model, source):
        program = _graph_of(model, dict(task.example(model.config)), task.varying_axes)
    # Optimum's classes take the first output, and an unused pooler would be computed.
    program.graph.outputs[:] = [value for value in program.graph.outputs if value.name == task.output]
    slim_(program)
    for value in (*program.graph.inputs, *program.graph.outputs):
        assert value.shape is not None
        names = _IMAGE if len(value.shape) == len(_IMAGE) else _SEQUENCE[: len(value.shape)]
        sizes = [size if isinstance(size, int) else name for name, size in zip(names, value.shape, strict=True)]
        value.shape = ir.Shape(sizes)
    return program


def _graph_of(module: Any, inputs: dict[str, Any], axes: int | None = None) -> ir.Model:
    """The first `axes` dimensions of every input vary; all if None."""
    from torch.export import Dim
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    varying = None if axes is None else {name: dict.fromkeys(range(axes), Dim.AUTO) for name in inputs}
    exported = OnnxExporter().export(module, inputs, OnnxConfig(dynamic=True, dynamic_shapes=varying))
    # transformers 5.17 returns torch's ONNXProgram, later releases a wrapper of their own
    program = exported.program if hasattr(exported, "program") else exported.model
    for node in program.graph.all_nodes():  # the tracer notes lines of source, with paths of this machine
        node.metadata_props.clear()
    return program


@contextmanager
def _tracing(model: Any, source: ModelSource) -> Iterator[None]:
    """Silence the tracer, and raise a ModelError for any error within."""
    what = f"transformers' ONNX exporter does not manage {type(model).__name__}"
    with silenced(), translated(lambda said: ModelError(f"{source.name!r}: {what} ({said})")):
        yield


def _drop_counters_(program: ir.Model) -> None:
    """Slim the graph without the counts of tokens in layers with states, where nothing else uses them."""
    inputs, outputs = program.graph.inputs, program.graph.outputs
    outputs[:] = [value for value in outputs if not (value.name or "").endswith(_COUNTER)]
    slim_(program)
    inputs[:] = [value for value in inputs if not (value.name or "").endswith(_COUNTER) or value.uses()]


def _fold_windows_(program: ir.Model, config: Any) -> None:
    """Make the width of sliding windows a constant, not a part of the cache; the cache keeps all tokens."""
    from transformers import DynamicCache

    layers, graph = DynamicCache(config=config).layers, program.graph
    for value in list(graph.inputs):
        if match := _WINDOW_NAME.fullmatch(value.name or ""):
            graph.inputs.remove(value)
            value.const_value = ir.tensor(np.array(layers[int(match[2])].sliding_window, np.int64), name=value.name)
            graph.register_initializer(value)
    for value in list(graph.outputs):
        if _WINDOW_NAME.fullmatch(value.name or ""):
            graph.outputs.remove(value)


def _name_values_(program: ir.Model, source: ModelSource) -> None:
    """Name the cache and the dynamic dimensions, and make the cache's fixed dimensions plain numbers."""
    for values, stem, tokens in (
        (program.graph.inputs, "past_key_values", "past_sequence_length"),
        (program.graph.outputs, "present", "total_sequence_length"),
    ):
        for value in values:
            assert value.shape is not None
            if match := _CACHE_NAME.fullmatch(value.name or ""):
                layer, kind, number = match.groups()
                value.name = f"{stem}.{layer}.{_PARTS[kind]}" + (f"_{number}" if int(number or 0) else "")
                wanted = ["batch_size", *[None] * (len(value.shape) - 1)]
                if not STATE.search(value.name):
                    wanted[2] = tokens
            elif value.name in _DIMENSIONS:
                wanted = _DIMENSIONS[value.name]
            else:
                raise _not_plain(source, value.name)
            sizes = [int(str(size)) if name is None else name for name, size in zip(wanted, value.shape, strict=True)]
            value.shape = ir.Shape(sizes)


def _not_plain(source: ModelSource, what: str | None) -> ModelError:
    return ModelError(
        f"{source.name!r}: its cache has {what} beside keys, values and states, for which ONNX exports have no inputs "
        "and outputs; export to a sparse PyTorch format"
    )


def genai_config(program: ir.Model, config: Any) -> dict[str, Any] | None:
    """The `genai_config.json` for onnxruntime-genai; None if it does not know the states."""
    config = config.get_text_config()
    given = {value.name or "": value for value in program.graph.inputs}
    cache = [name for name in given if name.startswith("past_key_values.")]
    has_states = any(map(STATE.search, cache))
    if has_states and config.model_type not in _GENAI_STATES:
        return None
    keys = next(value for name, value in given.items() if name.endswith(".key"))
    assert keys.shape is not None
    _, kv_heads, _, head_size = keys.shape
    length = first_of(config, POSITIONS) or _UNLIMITED
    end, pad = (getattr(config, f"{kind}_token_id", None) for kind in ("eos", "pad"))
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": int(head_size),
        "hidden_size": first_of(config, WIDTHS),
        "num_attention_heads": first_of(config, HEADS),
        "num_hidden_layers": len({name.split(".")[1] for name in cache}),
        **({"layer_types": config.layer_types} if has_states else {}),
        "num_key_value_heads": int(kv_heads),
        "inputs": {name: value for name, value in GENAI_INPUTS.items() if value in given or "%d" in value},
        "outputs": dict(GENAI_OUTPUTS),
    }
    return {
        "model": {
            "type": config.model_type,
            "bos_token_id": getattr(config, "bos_token_id", None),
            "eos_token_id": end,
            "pad_token_id": pad if pad is not None else end,
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": decoder,
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


def note_limit(folder: Path, name: str) -> int | None:
    """The most tokens that a graph with a recurrence reads at once, also written to its metadata; None if unlimited.

    Tracing keeps one chunk of a recurrence. `OnnxRuntime` reads longer texts in several calls.
    """
    runtime = OnnxRuntime(ModelSource(name, folder), "cpu", torch.get_num_threads())

    def reads(tokens: int) -> bool:
        try:
            runtime.predict({"input_ids": torch.zeros(1, tokens, dtype=torch.int64)})
        except ModelError:
            return False
        return True

    if not reads(CHUNKS[0]):
        raise ModelError(
            f"{name!r}: tracing keeps a fixed number of steps of its recurrence; export to a sparse PyTorch format"
        )
    limit = next((chunk for chunk in CHUNKS if not reads(chunk + 1)), None)
    if limit is not None:
        graph = onnx.load(folder / GRAPH, load_external_data=False)
        graph.metadata_props.add(key=AT_ONCE, value=str(limit))
        onnx.save(graph, folder / GRAPH)
    return limit
