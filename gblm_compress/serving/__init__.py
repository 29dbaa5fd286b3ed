"""Packed folders in other engines: vLLM calls `vllm_plugin`, which loads `vllm_layers`."""
