"""The fused ONNX graph of a decoder, by the model builder of onnxruntime-genai.

Attention with its cache and rotary embedding is one operator (GroupQueryAttention), a residual with its norm another,
and the products of queries, keys and values are one. The builder writes the graph from the weights, without tracing.
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

from gblm_compress.errors import ModelError
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_kinds
from gblm_compress.models.source import ModelSource

ARCHITECTURES = frozenset(
    {
        "Ernie4_5ForCausalLM",
        "Gemma2ForCausalLM",
        "GemmaForCausalLM",
        "GraniteForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)
"""Those of the builder's whose graphs are the same function as transformers' (tests/exporters/test_onnx_fused.py)."""

_WINDOWED = frozenset({"Gemma2ForCausalLM"})  # the same for models with sliding windows

# For the CPU the builder has no GroupQueryAttention in float16; the graph for CUDA has, and runs on the CPU as well.
_ARGUMENTS = {"float32": ("-p", "fp32", "-e", "cpu"), "float16": ("-p", "fp16", "-e", "cuda")}
_OPSET = 21  # of ONNX Runtime 1.20
# Nothing is fetched, no code of a model is run, and every layer has the whole cache.
_OPTIONS = ("hf_token=false", "hf_remote=false", "windowed_kv_cache=false")


def builds(model: nn.Module) -> bool:
    """Whether there is a fused graph of such a model."""
    windowed = cache_kinds(model.config) != {"DynamicLayer"}
    return type(model).__name__ in (_WINDOWED if windowed else ARCHITECTURES)


def build(model: Any, tokenizer: Any, source: ModelSource, dtype: str, folder: Path) -> tuple[ir.Model, dict[str, Any]]:
    """Build the graph in `folder`, which must stay as long as the graph is in use: its weights are read from there.

    Returns:
        The graph and its `genai_config.json`.

    Raises:
        ModelError: the builder does not manage the model.
    """
    given, built = folder / "model", folder / "graph"
    model.save_pretrained(given)
    loading.save_tokenizer(tokenizer, given)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", given, "-o", built, *_ARGUMENTS[dtype]]
    command += ["-c", folder / "cache", "--extra_options", *_OPTIONS]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ModelError(
            f"{source.name!r}: onnxruntime-genai's model builder does not manage {type(model).__name__} "
            f"({said[-1][:300]}); export with --graph plain"
        )
    program = ir.load(built / "model.onnx")
    config = json.loads((built / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    _fix_dimensions(program, config["model"]["decoder"]["head_size"])
    _ask_for_no_more(program)
    return program, config


def _fix_dimensions(program: ir.Model, head_size: int) -> None:
    """Make the cache's last dimension the number that it is."""
    for value in (*program.graph.inputs, *program.graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")):
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:3], head_size])


def _ask_for_no_more(program: ir.Model) -> None:
    """Let the graph name the oldest operator set that has its operators, and no inputs that it leaves empty, so that
    ONNX Runtime from 1.20 on loads it."""
    latest, needed = program.opset_imports[""], 1
    for node in program.graph:
        if node.domain == "" and onnx.defs.has(node.op_type):
            needed = max(needed, onnx.defs.get_schema(node.op_type, latest).since_version)
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
    program.opset_imports[""] = max(needed, _OPSET)
