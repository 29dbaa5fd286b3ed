"""ONNX Runtime on an exported folder: `OnnxRuntime` for models that generate, `OnnxForward` for the others."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gblm_compress.errors import MissingDependencyError, ModelError, translated
from gblm_compress.kernels import cpu
from gblm_compress.measure.timings import Part
from gblm_compress.models import loading
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample

ONNX_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
PACKED = ("BitmaskLinear", "QuantisedLinear")  # operators of this package that read packed weights
WARM = 6  # runs of the smallest profile; the first does not count
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
AT_ONCE = "gblm_tokens_at_once"  # Key of a graph's metadata: the most tokens that it reads in one call, if limited
STATE = re.compile(r"_state(_\d+)?$")  # Names of inputs and outputs of fixed size
_LOGITS, _PAST = "logits", "past_key_values."


def check_onnx_provider(device: str) -> str:
    import onnxruntime

    provider = _PROVIDERS.get(device.partition(":")[0], device)
    if provider not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"ONNX Runtime {onnxruntime.__version__} has no {provider}; it has "
            f"{', '.join(onnxruntime.get_available_providers())}. See `gblm-compress doctor`"
        )
    return provider


class _Graph:
    """The graph of a folder, opened with this package's operators; `step_ms` and `kernels` need `profile`."""

    def __init__(self, source: ModelSource, device: str, threads: int, profile: bool, prediction: str) -> None:
        import onnxruntime

        self.step_ms: dict[str, float] = {}
        self._profiles: dict[int, dict[str, int]] = {}
        kind, _, index = device.partition(":")
        self._device, self._name = (kind, int(index or 0)), source.name
        provider = check_onnx_provider(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors come as exceptions
        if source.needs_operator:
            library = cpu.onnxruntime_library()
            with translated(
                lambda said: MissingDependencyError(
                    f"ONNX Runtime {onnxruntime.__version__} does not take the operators of gblm-compress ({said}); "
                    "install a newer one, or export without --kernels"
                )
            ):
                options.register_custom_ops_library(str(library))
        if profile:
            self._records = TemporaryDirectory()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._records.name) / "profile")
        providers = [(provider, {"device_id": index or "0"})] if kind == "cuda" else [provider]
        with self._named_errors("load"):
            self._session = onnxruntime.InferenceSession(source.folder / GRAPH, options, providers=providers)
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            raise MissingDependencyError(
                f"ONNX Runtime was asked for {provider} and fell back to {self.provider}; CUDA and cuDNN of the "
                "versions it was built for are needed"
            )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: value.type for value in self._session.get_outputs()}
        if self._outputs.get(prediction) not in ONNX_TYPES:
            raise self._other_interface(f"it has no output {prediction!r} of floating-point numbers")
        self.dtype = ONNX_TYPES[self._outputs[prediction]]

    def _named_errors(self, verb: str) -> AbstractContextManager[None]:
        return translated(lambda said: ModelError(f"{self._name!r}: ONNX Runtime cannot {verb} it ({said})"))

    def _other_interface(self, what: str) -> ModelError:
        return ModelError(
            f"{self._name!r}: model.onnx is not an export of this program: {what}; make it again with "
            "`gblm-compress export MODEL -o OUT --format onnx`"
        )

    def _profile(self, profile: Sequence[int], run: Callable[[int], int]) -> None:
        """Record `kernels` and `step_ms`, and end the profiling. `run(tokens)` returns the number of the graph's calls.

        Times are medians over runs on the smallest number of tokens, without the first.
        """
        counts = sorted(set(profile))
        if not counts:
            return
        calls = [run(tokens) for tokens in [*[counts[0]] * WARM, *counts]]
        ran: list[Counter[str]] = [Counter() for _ in calls]
        took: list[Counter[str]] = [Counter() for _ in calls]
        turns = [number for number, times in enumerate(calls) for _ in range(times)]
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                operator = event["args"]["op_name"]
                ran[turns[0]][f"{operator} ({event['args']['provider']})"] += 1
                took[turns[0]][part_of(event["name"], operator)] += event["dur"]
            elif event["name"] == "model_run":  # comes after the operators of its call
                del turns[0]
        assert not turns
        self._records.cleanup()
        steps = took[1:WARM]
        self.step_ms = {part: median(step[part] for step in steps) / 1000 for part in steps[-1]}
        self._profiles = {tokens: dict(run.most_common()) for tokens, run in zip(counts, ran[WARM:], strict=True)}

    def kernels(self, tokens: int) -> dict[str, int]:
        """{operator (provider): how often it ran} on the largest recorded number of tokens, at most `tokens`."""
        assert self._profiles, "the runtime must be loaded with `profile`"
        return self._profiles[max((n for n in self._profiles if n <= tokens), default=min(self._profiles))]


def part_of(node: str, operator: str) -> Part:
    if "lm_head" in node:
        return "head"
    if operator in PACKED:
        return "packed products"
    if operator.startswith(("MatMul", "Gemm", "DenseLinear", "FusedMatMul")):
        return "dense products"
    return "attention" if "Attention" in operator or "Softmax" in operator else "rest"


class OnnxForward(_Graph):
    def __init__(self, source: ModelSource, device: str, threads: int, *, profile: Sequence[int] = ()) -> None:
        self._task, config = loading.task_of(source), loading.config_of(source)
        super().__init__(source, device, threads, bool(profile), self._task.output)

        def run(tokens: int) -> int:
            self.predict(self._task.timed(config, 1, tokens, seed=0))
            return 1

        self._profile(profile, run)

    def predict(self, sample: Sample) -> Tensor:
        if missing := [name for name in self._inputs if name not in sample]:
            raise self._other_interface(f"input {missing[0]!r} is not known")
        floats = getattr(torch, self.dtype)
        given = {
            name: (sample[name].to(floats) if sample[name].is_floating_point() else sample[name]).numpy()
            for name in self._inputs
        }
        with self._named_errors("run"):
            (prediction,) = self._session.run([self._task.output], given)
        return torch.from_numpy(prediction).float()


class _Cache(NamedTuple):
    """Values of `OnnxRuntime._past` on the device, perhaps with room for more tokens, and the number of tokens."""

    values: list[Any]
    length: int


class OnnxRuntime(_Graph):
    """The KV cache stays on the device. A fused graph extends it in place, a plain one makes a new one each step."""

    def __init__(self, source: ModelSource, device: str, threads: int, *, profile: Sequence[int] = ()) -> None:
        import onnxruntime

        super().__init__(source, device, threads, bool(profile), _LOGITS)
        self._ort_value = onnxruntime.OrtValue.ortvalue_from_numpy
        # Outputs can be written into the memory of the inputs that they continue.
        self._shares_cache = "GroupQueryAttention" in source.operators
        self._read_interface()
        self._profile(profile, self._calls_of)

    def predict(self, sample: Sample) -> Tensor:
        ids = sample["input_ids"]
        logits, _ = self._run(ids.numpy(), self._empty(len(ids)))
        return torch.from_numpy(logits).float()

    def next_token(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids, cache)
        return torch.from_numpy(logits.argmax(-1, keepdims=True)), cache

    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids, cache)
        return torch.from_numpy(logits).float(), cache

    def _calls_of(self, tokens: int) -> int:
        self.next_token(torch.zeros(1, tokens, dtype=torch.int64), None)
        return -(-tokens // (self._at_once or tokens))

    def _step(self, ids: Tensor, cache: _Cache | None) -> tuple[Any, _Cache]:
        cache = cache or self._empty(len(ids))
        if self._shares_cache:
            cache = self._with_room(cache, ids)
        logits, cache = self._run(ids.numpy(), cache)
        return logits[:, -1], cache

    def _run(self, ids: Any, cache: _Cache) -> tuple[Any, _Cache]:
        """Logits [batch, tokens, vocabulary] of all tokens, and the cache."""
        if self._at_once is None or ids.shape[1] <= self._at_once:
            return self._call(ids, cache)
        parts = []
        for start in range(0, ids.shape[1], self._at_once):
            logits, cache = self._call(ids[:, start : start + self._at_once], cache)
            parts.append(logits)
        return np.concatenate(parts, axis=1), cache

    def _call(self, ids: Any, cache: _Cache) -> tuple[Any, _Cache]:
        batch, tokens = ids.shape
        past, length = cache.length, cache.length + tokens
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, length), np.int64),
            "position_ids": np.broadcast_to(np.arange(past, length), (batch, tokens)),
        }
        in_place = self._shares_cache and cache.values[0].shape()[2] > past
        with self._named_errors("run"):
            binding = self._session.io_binding()
            for name in self._takes:
                binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
            for name, value in zip(self._past, cache.values, strict=True):
                binding.bind_ortvalue_input(name, value)
            binding.bind_output(_LOGITS, "cpu")
            for name, value in zip(self._present, cache.values, strict=True):
                if in_place:
                    binding.bind_ortvalue_output(name, value)
                else:
                    binding.bind_output(name, *self._device)
            self._session.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
            logits = logits.numpy()
        if logits.ndim != 3 or logits.shape[:2] != ids.shape or logits.shape[2] <= ids.max():
            raise self._other_interface(
                f"for {batch} × {tokens} tokens up to number {ids.max()} output {_LOGITS!r} has the shape "
                f"{list(logits.shape)}; [{batch}, {tokens}, size of the vocabulary] is needed",
            )
        return logits, _Cache(cache.values if in_place else present, length)

    def _with_room(self, cache: _Cache, ids: Tensor) -> _Cache:
        """The cache with room for `ids` [batch, tokens]: itself, or a copy of twice the needed size."""
        tokens = ids.shape[1]
        if cache.values[0].shape()[2] >= cache.length + tokens:
            return cache
        room = 2 * (cache.length + tokens)
        widths = [[(0, 0), (0, 0), (0, room - value.shape()[2]), (0, 0)] for value in cache.values]
        wider = [np.pad(value.numpy(), width) for value, width in zip(cache.values, widths, strict=True)]
        return _Cache([self._ort_value(value, *self._device) for value in wider], cache.length)

    def _empty(self, batch: int) -> _Cache:
        empty = [np.zeros((batch, *shape), dtype) for dtype, shape in self._past.values()]
        return _Cache([self._ort_value(value, *self._device) for value in empty], 0)

    def _read_interface(self) -> None:
        self._takes = [name for name in ("input_ids", "attention_mask", "position_ids") if name in self._inputs]
        # {input of the cache: its dtype, and its shape before the first token, without the batch}
        self._past: dict[str, tuple[str, list[int]]] = {}
        self._present: list[str] = []
        for name, value in self._inputs.items():
            if name in self._takes:
                continue
            shape, present = list(value.shape[1:]), name.replace(_PAST, "present.", 1)
            if len(shape) == 3 and not STATE.search(name):
                shape[1] = 0  # no token yet: keys and values are [heads, tokens, width]
            known = name.startswith(_PAST) and present in self._outputs and value.type in ONNX_TYPES
            if not known or not shape or not all(isinstance(size, int) and size >= 0 for size in shape):
                raise self._other_interface(f"input {name!r} of {value.type} {value.shape} is not known")
            self._past[name] = ONNX_TYPES[value.type], shape
            self._present.append(present)
        if not self._past:
            raise self._other_interface(f"it has no input {_PAST}*, so it cannot continue from a cache")
        said = self._session.get_modelmeta().custom_metadata_map.get(AT_ONCE)
        if said is not None and not re.fullmatch(r"[1-9]\d{0,8}", said):
            raise self._other_interface(f"metadata {AT_ONCE!r} is {said[:40]!r}; a number of tokens is needed")
        self._at_once = None if said is None else int(said)
