"""vLLM on a Hugging Face folder, dense or packed: its engine in this process, stepped by hand."""

import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import ModelError, UsageError, first_line
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample

CACHE_GIB = "1"
"""What the KV cache takes on a CPU, where vLLM would reserve most of the memory."""


class VllmRuntime:
    """Greedy decoding by vLLM's engine: one request a sequence, all of them in one batch.

    Scheduling, cache, compiled graph and choice of tokens are those of `vllm serve`; its server and its prefix cache
    are left out.
    """

    def __init__(self, source: ModelSource, dtype: str, device: str, threads: int) -> None:
        # read when vLLM is imported; what the user has set stays. The engine runs in this process, on these cores
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

        import vllm
        from vllm.platforms import current_platform

        if current_platform.device_type != device.partition(":")[0]:
            raise UsageError(f"this vLLM is built for {current_platform.device_type}; give --device accordingly")
        if device.partition(":")[2] not in ("", "0"):
            raise UsageError(
                f"vLLM runs on the first CUDA device that it sees, and {device} was asked for; give --device cuda, and "
                "the number in CUDA_VISIBLE_DEVICES"
            )
        self._params = vllm.SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, detokenize=False)
        try:
            self._llm = vllm.LLM(str(source.folder), dtype=dtype, enable_prefix_caching=False, disable_log_stats=True)
        except Exception as error:  # vLLM, transformers and torch each raise their own kinds for what does not load
            raise ModelError(f"{source.name!r}: vLLM cannot load it ({first_line(error)})") from error
        self._engine = self._llm.llm_engine
        self._tokens: dict[str, list[int]] = {}
        self._started = 0
        self.provider, self.dtype = f"vLLM {vllm.__version__} on {current_platform.device_type}", dtype

    def predict(self, sample: Sample) -> Tensor:
        raise UsageError("vLLM gives no logits of a whole text; models are evaluated in torch")

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        self._engine.abort_request(list(self._tokens))
        self._tokens = {}
        for row in ids.tolist():
            name = str(self._started)
            self._started += 1
            self._tokens[name] = []
            self._engine.add_request(name, {"prompt_token_ids": row}, self._params)
        return self._next(1), 1

    def decode(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """`ids` are those that the engine chose itself, and are not given to it again."""
        return self._next(cache + 1), cache + 1

    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        raise UsageError("vLLM gives no logits of a whole text; models are evaluated in torch")

    def step_ms(self) -> dict[str, float]:
        return {}

    def kernels(self, tokens: int) -> dict[str, int]:
        """Those of the packed layers, merged as vLLM merges them; its own layers count as dense."""

        def count(model: Any) -> dict[str, int]:
            from vllm.model_executor.layers.linear import LinearBase

            layers = [module for module in model.modules() if isinstance(module, LinearBase)]
            packed = [next((m for m in layer.children() if isinstance(m, PackedLinear)), None) for layer in layers]
            return dict(Counter("dense" if layer is None else layer.kernel(tokens) for layer in packed))

        found: dict[str, int] = self._llm.apply_model(count)[0]
        return found

    def _next(self, number: int) -> Tensor:
        """Token `number` of every sequence, [batch, 1]; the engine is stepped until all have it."""
        while any(len(tokens) < number for tokens in self._tokens.values()):
            if not self._engine.has_unfinished_requests():
                raise ModelError("vLLM ended a sequence early; give a smaller --prompt or --generate")
            for output in self._engine.step():
                if output.request_id in self._tokens:
                    self._tokens[output.request_id] = list(output.outputs[0].token_ids)
        return torch.tensor([tokens[number - 1] for tokens in self._tokens.values()]).unsqueeze(1)
