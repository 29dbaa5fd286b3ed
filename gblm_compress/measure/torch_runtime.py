"""Eager torch on a Hugging Face folder, dense or packed."""

from collections import Counter
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.architecture import cache_argument
from gblm_compress.tasks import task_of
from gblm_compress.tasks.task import Sample, on_device


class TorchRuntime:
    """Eager torch on a transformers model."""

    def __init__(self, model: Any) -> None:
        self.model, self.task = model, task_of(type(model))
        self.provider = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def predict(self, sample: Sample) -> Tensor:
        output = self.model(**self.task.arguments(on_device(sample, self.model.device)))
        prediction: Tensor = getattr(output, self.task.output)
        return prediction.float().cpu()

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        return self._greedy(ids.to(self.model.device), None)

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self._greedy(ids, cache)

    @torch.inference_mode()
    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids.to(self.model.device), cache)
        return logits.float().cpu(), cache

    def step_ms(self) -> dict[str, float]:
        return {}

    def kernels(self, tokens: int) -> dict[str, int]:
        layers = [m for m in self.model.modules() if isinstance(m, (nn.Linear, Conv1D, PackedLinear))]
        return dict(Counter(m.kernel(tokens) if isinstance(m, PackedLinear) else "dense" for m in layers))

    @cached_property
    def _cache_argument(self) -> str:
        return cache_argument(self.model)

    def _greedy(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids, cache)
        token = logits.argmax(-1, keepdim=True)
        if token.is_cuda:
            torch.cuda.synchronize(token.device)
        return token, cache

    def _step(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        past = {} if cache is None else {self._cache_argument: cache}
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **past)
        return output.logits[:, -1], output[self._cache_argument]
