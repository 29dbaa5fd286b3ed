"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes before it reads a model."""

from importlib import import_module


def register() -> None:
    import_module("gblm_compress.serving.vllm_layers")  # registers it
