"""How engines of others serve packed folders: `vllm_plugin` is what vLLM calls, over `vllm_layers` and `parts`."""
