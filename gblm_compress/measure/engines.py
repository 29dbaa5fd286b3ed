"""onnxruntime-genai, an engine that generates in a loop of its own."""

import json
import operator
from collections.abc import Iterator
from contextlib import chdir
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import ModelError, first_line
from gblm_compress.kernels import cpu
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.storage.records import read_json

ROOM = 1024  # Default room of genai's cache beyond the prompt, in tokens; it is allocated whole.

GENAI_INPUTS = {
    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
GENAI_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
_SESSION = "model.decoder.session_options"
# {key: the only text it may have; None for any}. genai loads files and libraries by texts, and gives them to printf.
_TEXTS: dict[str, str | None] = {
    **dict.fromkeys(("model.type", "model.decoder.layer_types", f"{_SESSION}.log_id")),
    "model.decoder.filename": GRAPH,
    **{f"model.decoder.inputs.{name}": value for name, value in GENAI_INPUTS.items()},
    **{f"model.decoder.outputs.{name}": value for name, value in GENAI_OUTPUTS.items()},
}
_LIBRARY = {f"{_SESSION}.custom_ops_library": None}  # the program loads its own instead


class GenaiRuntime:
    """The library's `Generator` is the cache; it keeps the tokens that it chose, so `decode` does not use its `ids`."""

    def __init__(self, source: ModelSource, device: str, threads: int, room: int = ROOM) -> None:
        import onnxruntime_genai

        self._library, self._name = onnxruntime_genai, source.name
        session: dict[str, Any] = {"intra_op_num_threads": threads}
        place = source.folder
        if source.needs_operator:
            # It loads a library from the model's folder or the working directory, and this program only its own.
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

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        batch, tokens = ids.shape
        options = self._library.GeneratorParams(self._model)
        longest = min(self._longest, tokens + self._room)
        options.set_search_options(batch_size=batch, max_length=longest, do_sample=False)
        try:
            generator = self._library.Generator(self._model, options)
            generator.append_tokens(ids.int().numpy())
        except RuntimeError as error:
            raise ModelError(f"{self._name!r}: onnxruntime-genai cannot run it ({str(error)[:300]})") from error
        return self.decode(ids, generator)

    def decode(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        cache.generate_next_token()
        return torch.from_numpy(cache.get_next_tokens()).long().unsqueeze(1), cache

    def kernels(self, tokens: int) -> dict[str, int]:
        """The operators of the exported graph; the library does not say what it runs."""
        return {f"{name} (onnxruntime-genai)": count for name, count in self._operators.items()}


def _checked_length(source: ModelSource) -> int:
    """The longest sequence by `genai_config.json`, whose texts must be those that exports write."""
    path = source.folder / "genai_config.json"
    try:
        content = read_json(path, unique=True)
        longest = operator.index(content["model"]["context_length"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{source.name!r}: it has no genai_config.json that onnxruntime-genai can use ({first_line(error)})"
        ) from error
    known = _TEXTS | (_LIBRARY if source.needs_operator else {})
    for key, text in _texts(content):
        if key not in known or known[key] not in (None, text):
            wanted = repr(known[key]) if key in known else "no text"
            raise ModelError(
                f"{source.name!r}: {path.name} has {key} {text[:80]!r}, where exports have {wanted}; export the model "
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
