"""The fused ONNX graph of a decoder, by the model builder of onnxruntime-genai. No other module knows the builder.

Attention with its cache and rotary embedding is one operator (GroupQueryAttention), and a residual with its norm
another. Queries, keys and values are one product. The builder writes the graph from the weights, without tracing.
It runs in a process of its own, because it changes the import path and prints.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from safetensors.torch import save_file
from torch import nn

from gblm_compress.errors import ModelError, is_out_of_memory
from gblm_compress.exporters.onnx_builder import PARTS
from gblm_compress.exporters.onnx_weights import Place, constant, initializer
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_kinds
from gblm_compress.models.files import SINGLE
from gblm_compress.models.source import ModelSource

_NAMES = "Ernie4_5 Gemma Gemma2 Gemma3 Granite HunYuanDenseV1 Llama Mistral Nemotron Phi Phi3 Qwen2 Qwen3 SmolLM3"
# Tested in tests/exporters/test_onnx_fused.py.
ARCHITECTURES = frozenset(f"{name}ForCausalLM" for name in _NAMES.split())

# These are also right with sliding windows.
WINDOWED = frozenset(
    f"{name}ForCausalLM" for name in ("Gemma2", "Gemma3", "Mistral", "Phi3", "Qwen2", "Qwen3", "SmolLM3")
)

# Rotary embeddings that are right, beside the default; the builder ignores some.
_ROPE_TYPES = {
    "GraniteForCausalLM": {"linear"},
    "HunYuanDenseV1ForCausalLM": {"dynamic"},
    "LlamaForCausalLM": {"llama3"},
}

# The builder has GroupQueryAttention in float16 for CUDA only; that graph runs on the CPU as well.
_ARGUMENTS = {"float32": ("-p", "fp32", "-e", "cpu"), "float16": ("-p", "fp16", "-e", "cuda")}
_OPSET = 21  # of ONNX Runtime 1.20
# {prefix of a rotary table's name: the operator that makes it}
TABLES = {"cos_cache": "Cos", "sin_cache": "Sin"}
_ROUNDINGS = 4  # Float32 roundings that an angle may differ by: programs compute powers differently.
# Nothing is fetched, no code of a model is run, and every layer has the whole cache. Norms of queries and keys are
# separate nodes: inside attention they are for CUDA only.
_OPTIONS = ("hf_token=false", "hf_remote=false", "windowed_kv_cache=false", "fuse_qk_norm_gqa=false")


def why_not(model: nn.Module) -> str | None:
    """Why the model has no fused graph; None if it has one."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        return f"{name}: fused graphs exist for {', '.join(sorted(ARCHITECTURES))}"
    known = {"DynamicLayer", "DynamicSlidingWindowLayer"} if name in WINDOWED else {"DynamicLayer"}
    if others := cache_kinds(config) - known:
        return f"{name}: a cache of {', '.join(sorted(others))} would give wrong results"
    rope = getattr(config, "rope_parameters", None) or {}
    types = {each["rope_type"] for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_type" in each}
    if others := types - {"default"} - _ROPE_TYPES.get(name, set()):
        return f"{name}: a rotary embedding of type {', '.join(sorted(others))} is not known to work"
    return None


def build(
    model: Any, tokenizer: Any, source: ModelSource, dtype: str
) -> tuple[ir.Model, dict[str, Place], dict[str, Any]]:
    """The graph, where it has layers, and its `genai_config.json`. Its matrices are read from the model when used."""
    with TemporaryDirectory() as folder:
        built = _built(model, tokenizer, source, dtype, Path(folder))
        program, parts = ir.load(built / "model.onnx"), json.loads((built / PARTS).read_text())
        config = json.loads((built / "genai_config.json").read_text())
    # The builder adds the commit of the git repository around its environment.
    program.producer_version = (program.producer_version or "").partition("+")[0]
    places: dict[str, Place] = {}
    for name, made_of in parts.items():
        places |= _fill_(program.graph.initializers[name], model, **made_of)
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    attentions = [node for node in program.graph if node.op_type == "GroupQueryAttention"]
    for node, is_rotary in zip(attentions, getattr(model.config, "no_rope_layers", None) or (), strict=False):
        if not is_rotary:
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
            node.replace_input_with(7, None)  # the tables of cosines and sines
            node.replace_input_with(8, None)
    for value in (*program.graph.inputs, *program.graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")):
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:3], config["model"]["decoder"]["head_size"]])
    _ask_for_no_more(program)
    turns = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    calculate_rotations_(program, [each.float().cpu().numpy() for each in turns])
    return program, places, config


def _built(model: Any, tokenizer: Any, source: ModelSource, dtype: str, folder: Path) -> Path:
    """The folder of the builder's graph, its `genai_config.json` and `PARTS`."""
    given, built = folder / "model", folder / "graph"
    model.config.save_pretrained(given)
    model.generation_config.save_pretrained(given)
    vectors = {name: one.detach() for name, one in model.named_parameters() if one.dim() == 1 and len(one)}
    save_file(vectors, given / SINGLE)
    loading.save_processor(tokenizer, given)
    stored = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(_in_terms_of_the_builder(stored)))
    command = [sys.executable, "-m", "gblm_compress.exporters.onnx_builder", "-i", given, "-o", built]
    command += [*_ARGUMENTS[dtype], "-c", folder / "cache", "--extra_options", *_OPTIONS]
    if type(model).__name__ == "Phi3ForCausalLM":
        command += ["fuse_mlp_gate_up=true"]  # one layer in the model
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        said = RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300])
        if is_out_of_memory(said):
            raise said
        raise ModelError(
            f"{source.name!r}: onnxruntime-genai's model builder does not manage {type(model).__name__} "
            f"({said}); export with --graph plain"
        )
    return built


def _fill_(value: ir.Value, model: Any, turned: bool, rows: dict[str, int]) -> dict[str, Place]:
    """Let weights of `model`, one below the other or `turned`, be an initializer; {layer: its place}."""
    modules = [model.get_submodule(name) for name in rows]

    def made() -> ir.Tensor[Any]:
        weights = [module.weight.detach() for module in modules]
        stacked = (weights[0] if len(weights) == 1 else torch.cat(weights)).numpy()
        return ir.Tensor(stacked.T if turned else stacked)

    assert value.dtype is not None and value.shape is not None
    value.const_value = ir.LazyTensor(made, dtype=value.dtype, shape=value.shape, name=value.name)
    shape, ends = tuple(map(int, value.shape)), accumulate(rows.values())
    return {name: Place(str(value.name), shape, end - rows[name], end) for name, end in zip(rows, ends, strict=True)}


def _in_terms_of_the_builder(config: dict[str, Any]) -> dict[str, Any]:
    made = dict(config)
    for norm in ("layer_norm_eps", "norm_eps"):
        if norm in config:
            made.setdefault("rms_norm_eps", config[norm])
    if config.get("sliding_window") and "layer_types" not in config:
        made["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope and "sliding_attention" in rope:
        local = rope["sliding_attention"]["rope_theta"]
        made["rope_parameters"] = {**rope, **rope["full_attention"], "rope_local_base_freq": local}
    if config["architectures"] == ["SmolLM3ForCausalLM"]:  # a Llama in which some layers have no rotary embedding
        made["architectures"] = ["LlamaForCausalLM"]
    return made


def _ask_for_no_more(program: ir.Model) -> None:
    """Set the oldest sufficient operator set, and drop empty inputs, so that ONNX Runtime 1.20 loads the graph."""
    latest, needed = program.opset_imports[""], 1
    for node in program.graph:
        if node.domain == "" and onnx.defs.has(node.op_type):
            needed = max(needed, onnx.defs.get_schema(node.op_type, latest).since_version)
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
    program.opset_imports[""] = max(needed, _OPSET)


def calculate_rotations_(program: ir.Model, frequencies: Sequence[Any]) -> None:
    """Replace the tables of rotary embeddings by the operators that make them, in place; other tables stay.

    The tables of a Llama with 131,072 positions and heads of 64 take 34 MB. ONNX Runtime folds the operators at load.
    `frequencies` of the model are float32 [pairs] each, in radians a position.
    """
    graph = program.graph
    tape = Tape()
    angles: dict[tuple[int, bytes], ir.Value] = {}

    def angles_of(positions: int, turns: Any) -> ir.Value:
        key = positions, turns.tobytes()
        if key not in angles:
            zero, one, end = (constant(graph, f"rotations.{n}", np.float32(n)) for n in (0, 1, positions))
            axis = constant(graph, "rotations.axis", np.array([1]))
            column = tape.op("Unsqueeze", [tape.op("Range", [zero, end, one]), axis])
            angles[key] = tape.op("Mul", [column, initializer(graph, f"rotations.turns.{len(angles)}", turns)])
        return angles[key]

    for table in list(graph.initializers.values()):
        operator = next((made_by for start, made_by in TABLES.items() if str(table.name).startswith(start)), None)
        if operator is None or table.const_value is None:
            continue
        stored = table.const_value.numpy()
        turns = next((each for each in frequencies if _makes(stored, operator, each)), None)
        if turns is None:
            continue
        made = tape.op(operator, [angles_of(len(stored), turns)])
        if table.dtype != ir.DataType.FLOAT:
            made = tape.op("Cast", [made], {"to": table.dtype})
        made.shape, made.dtype = table.shape, table.dtype
        del graph.initializers[str(table.name)]
        table.replace_all_uses_with(made)
        made.name = table.name
    if tape.nodes:
        graph.insert_before(graph[0], tape.nodes)


def _makes(table: Any, operator: str, turns: Any) -> bool:
    if table.ndim != 2 or turns.shape != table.shape[1:]:
        return False
    angles = np.outer(np.arange(len(table), dtype=np.float32), turns)
    expected = {"Cos": np.cos, "Sin": np.sin}[operator](angles)
    allowed = np.finfo(table.dtype).eps + _ROUNDINGS * np.finfo(np.float32).eps * angles
    return bool((np.abs(table - expected) <= allowed).all())
