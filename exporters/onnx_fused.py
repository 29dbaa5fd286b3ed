"""The fused ONNX graph of a decoder, by the model builder of onnxruntime-genai. No other module knows the builder.

Attention with its cache and rotary embedding is one operator (GroupQueryAttention), and a residual with its norm
another. Queries, keys and values are one product. The builder writes the graph from the weights, without tracing.
It runs in a process of its own, because it changes the import path and prints.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from gblm_compress.errors import ModelError, is_out_of_memory
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_kinds
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

_WRONG = {"OlmoForCausalLM": "onnxruntime-genai's builder gives it RMS norms, but it has others"}

# The builder has GroupQueryAttention in float16 for CUDA only; that graph runs on the CPU as well.
_ARGUMENTS = {"float32": ("-p", "fp32", "-e", "cpu"), "float16": ("-p", "fp16", "-e", "cuda")}
_OPSET = 21  # of ONNX Runtime 1.20
# Nothing is fetched, no code of a model is run, and every layer has the whole cache. Norms of queries and keys are
# separate nodes: inside attention they are for CUDA only.
_OPTIONS = ("hf_token=false", "hf_remote=false", "windowed_kv_cache=false", "fuse_qk_norm_gqa=false")


def why_not(model: nn.Module) -> str | None:
    """Why the model has no fused graph; None if it has one."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        exist = f"fused graphs exist for {', '.join(sorted(ARCHITECTURES))}"
        return f"{name}: {_WRONG.get(name, exist)}"
    known = {"DynamicLayer", "DynamicSlidingWindowLayer"} if name in WINDOWED else {"DynamicLayer"}
    if others := cache_kinds(config) - known:
        return f"{name}: a cache of {', '.join(sorted(others))} would give wrong results"
    rope = getattr(config, "rope_parameters", None) or {}
    types = {each["rope_type"] for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_type" in each}
    if others := types - {"default"} - _ROPE_TYPES.get(name, set()):
        return f"{name}: a rotary embedding of type {', '.join(sorted(others))} is not known to work"
    return None


def build(model: Any, tokenizer: Any, source: ModelSource, dtype: str, folder: Path) -> tuple[ir.Model, dict[str, Any]]:
    """The graph and its `genai_config.json`, built in `folder`, which must outlive the graph."""
    given, built = folder / "model", folder / "graph"
    model.save_pretrained(given)
    loading.save_processor(tokenizer, given)
    stored = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(_in_terms_of_the_builder(stored)))
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", given, "-o", built, *_ARGUMENTS[dtype]]
    command += ["-c", folder / "cache", "--extra_options", *_OPTIONS]
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
    program = ir.load(built / "model.onnx")
    # The builder adds the commit of the git repository around its environment.
    program.producer_version = (program.producer_version or "").partition("+")[0]
    config = json.loads((built / "genai_config.json").read_text())
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
    return program, config


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
