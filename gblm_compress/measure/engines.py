"""Engines that generate in a loop of their own: onnxruntime-genai and vLLM."""

import json
import operator
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir
from itertools import count
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import ModelError, UsageError, first_line
from gblm_compress.kernels import cpu
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.storage.records import read_json

ROOM = 1024  # Default room of genai's cache beyond the prompt, in tokens; it is allocated whole.
CACHE_GIB = "1"  # Size of vLLM's KV cache on a CPU, which by default takes most of the memory.

GENAI_INPUTS = {
    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
GENAI_OUTPUTS = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
_SESSION = "model.decoder.session_options"
# {key: the only text it may have; None for any}. genai loads files and libraries by texts, and gives them to printf.
_TEXTS: dict[str, str | None] = {
    **dict.fromkeys(("model.type", "model.decoder.layer_types", f"{_SESSION}.log_id")),
    "model.decoder.filename": GRAPH,
    **{f"model.decoder.inputs.{name}": value for name, value in GENAI_INPUTS.items()},
    **{f"model.decoder.outputs.{name}": value for name, value in GENAI_OUTPUTS.items()},
}


class GenaiRuntime:
    """The library's `Generator` is the cache; it keeps the tokens that it chose, so `ids` matter only at the start."""

    def __init__(self, source: ModelSource, device: str, threads: int, room: int = ROOM) -> None:
        import onnxruntime_genai

        self._library, self._name = onnxruntime_genai, source.name
        session: dict[str, Any] = {"intra_op_num_threads": threads}
        place = source.folder
        if source.needs_operator:
            # genai loads a library from the model's folder or the working directory; this program allows only its own.
            library = cpu.onnxruntime_library()
            session["custom_ops_library"], place = str(library), library.parent
        self._longest, self._room, self._operators = _checked_length(source), room, source.operators
        try:
            config = onnxruntime_genai.Config(str(source.folder.absolute()))
            config.clear_providers()
            kind, _, index = device.partition(":")
            if kind != "cpu":
                config.append_provider(kind)
                config.set_provider_option(kind, "device_id", index or "0")
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            with chdir(place):
                self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise ModelError(f"{source.name!r}: onnxruntime-genai cannot load it ({str(error)[:300]})") from error
        self.step_ms: dict[str, float] = {}
        self.provider, self.dtype = f"onnxruntime-genai on {self._model.device_type}", source.config["dtype"]

    def next_token(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if (generator := cache) is None:
            batch, tokens = ids.shape
            options = self._library.GeneratorParams(self._model)
            longest = min(self._longest, tokens + self._room)
            options.set_search_options(batch_size=batch, max_length=longest, do_sample=False)
            try:
                generator = self._library.Generator(self._model, options)
                generator.append_tokens(ids.int().numpy())
            except RuntimeError as error:
                raise ModelError(f"{self._name!r}: onnxruntime-genai cannot run it ({str(error)[:300]})") from error
        generator.generate_next_token()
        return torch.from_numpy(generator.get_next_tokens()).long().unsqueeze(1), generator

    def kernels(self, tokens: int) -> dict[str, int]:
        """The operators of the exported graph; the library does not name its own."""
        return {f"{name} (onnxruntime-genai)": count for name, count in self._operators.items()}


def _checked_length(source: ModelSource) -> int:
    """The longest sequence in `genai_config.json`. Texts that exports do not write are refused."""
    path = source.folder / "genai_config.json"
    try:
        content = read_json(path, unique=True)
        longest = operator.index(content["model"]["context_length"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{source.name!r}: it has no genai_config.json that onnxruntime-genai can use ({first_line(error)})"
        ) from error
    # The program loads its own library instead.
    known = _TEXTS | ({f"{_SESSION}.custom_ops_library": None} if source.needs_operator else {})
    for key, text in _texts(content):
        if key not in known or known[key] not in (None, text):
            wanted = repr(known[key]) if key in known else "no text"
            raise ModelError(
                f"{source.name!r}: {path.name} has {key} {text[:80]!r}, but exports have {wanted}; export the model "
                "again"
            )
    return longest


def _texts(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a JSON object; items of a list have its key."""
    parts: list[tuple[str, Any]] = list(content.items())
    while parts:
        key, part = parts.pop()
        if isinstance(part, str):
            yield key, part
        elif isinstance(part, list):
            parts += [(key, item) for item in part]
        elif isinstance(part, dict):
            parts += [(f"{key}.{name}", item) for name, item in part.items()]


class VllmRuntime:
    """vLLM's engine in this process, stepped by hand: one request a sequence, all in one batch.

    It works as in `vllm serve`, without server and prefix cache. It keeps the tokens that it chose, as genai does.
    """

    def __init__(self, source: ModelSource, dtype: str, device: str, threads: int) -> None:
        # read when vLLM is imported; the user's settings stay. The engine runs in this process, on these cores
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
        except Exception as error:  # vLLM, transformers and torch each raise their own kinds
            raise ModelError(f"{source.name!r}: vLLM cannot load it ({first_line(error)})") from error
        self._engine = self._llm.llm_engine
        self._tokens: dict[str, list[int]] = {}
        self._numbers = count()  # of requests
        self.step_ms: dict[str, float] = {}
        self.provider, self.dtype = f"vLLM {vllm.__version__} on {current_platform.device_type}", dtype

    def next_token(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The cache is the number of tokens so far."""
        if cache is None:
            self._engine.abort_request(list(self._tokens))
            self._tokens = {str(next(self._numbers)): [] for _ in ids}
            for name, row in zip(self._tokens, ids.tolist(), strict=True):
                self._engine.add_request(name, {"prompt_token_ids": row}, self._params)
        number = (cache or 0) + 1
        while any(len(tokens) < number for tokens in self._tokens.values()):
            if not self._engine.has_unfinished_requests():
                raise ModelError("vLLM ended a sequence early; give a smaller --prompt or --generate")
            for output in self._engine.step():
                if output.request_id in self._tokens:
                    self._tokens[output.request_id] = list(output.outputs[0].token_ids)
        return torch.tensor([tokens[number - 1] for tokens in self._tokens.values()]).unsqueeze(1), number

    def kernels(self, tokens: int) -> dict[str, int]:
        """The kernels of packed layers, merged as in vLLM; its own layers count as dense."""

        def counted(model: Any) -> dict[str, int]:
            from vllm.model_executor.layers.linear import LinearBase

            layers = [module for module in model.modules() if isinstance(module, LinearBase)]
            packed = [next((m for m in layer.children() if isinstance(m, PackedLinear)), None) for layer in layers]
            return dict(Counter("dense" if layer is None else layer.kernel(tokens) for layer in packed))

        found: dict[str, int] = self._llm.apply_model(counted)[0]
        return found
