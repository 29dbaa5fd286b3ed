"""onnxruntime-genai on an exported folder: its own loop, cache and choice of tokens around the same graph."""

import json
from contextlib import chdir
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import ModelError, first_line
from gblm_compress.kernels import cpu
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.storage.records import read_json
from gblm_compress.tasks.task import Sample

ROOM = 1024
"""Tokens that the cache has room for beyond the prompt, where nobody asks for more; the runtime allocates it whole."""
_HARMLESS = {"log_id", "provider_options"}
"""The options of a session that neither load libraries nor write files."""


class GenaiRuntime:
    """A generation is a `Generator` of the library; it stands for the cache of the protocol."""

    def __init__(self, source: ModelSource, device: str, threads: int, room: int = ROOM) -> None:
        """Args:
        room: as `ROOM`.
        """
        import onnxruntime_genai

        self._library, self._name = onnxruntime_genai, source.name
        session: dict[str, Any] = {"intra_op_num_threads": threads}
        place = source.folder
        if source.needs_operator:
            # It loads a library from the model's folder or the working directory, and this program only its own.
            library = cpu.onnxruntime_library()
            session["custom_ops_library"], place = str(library), library.parent
        self._longest, self._room = _checked_length(source), room
        self._operators = {f"{name} (onnxruntime-genai)": count for name, count in source.operators.items()}
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
        self.provider, self.dtype = f"onnxruntime-genai on {self._model.device_type}", source.config["dtype"]

    def predict(self, sample: Sample) -> Tensor:
        generator = self._generator(sample["input_ids"])
        return torch.from_numpy(generator.get_output("logits")).float()

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        return self.decode(ids, self._generator(ids))

    def decode(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """`ids` are those that the generator chose itself, and are not given to it again."""
        cache.generate_next_token()
        return torch.from_numpy(cache.get_next_tokens()).long().unsqueeze(1), cache

    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        """The library takes tokens of the caller's choice after a prompt for one sequence only."""
        if cache is None:
            cache = self._generator(ids)
        else:
            cache.append_tokens(ids.int().numpy())
        return torch.from_numpy(cache.get_logits()).float()[:, -1], cache

    def step_ms(self) -> dict[str, float]:
        return {}

    def kernels(self, tokens: int) -> dict[str, int]:
        """The operators of the graph as it was exported: this runtime says nothing of what it makes of them."""
        return self._operators

    def _generator(self, ids: Tensor) -> Any:
        batch, tokens = ids.shape
        options = self._library.GeneratorParams(self._model)
        longest = min(self._longest, tokens + self._room)
        options.set_search_options(batch_size=batch, max_length=longest, do_sample=False)
        try:
            generator = self._library.Generator(self._model, options)
            generator.append_tokens(ids.int().numpy())
        except RuntimeError as error:
            raise ModelError(f"{self._name!r}: onnxruntime-genai cannot run it ({str(error)[:300]})") from error
        return generator


def _checked_length(source: ModelSource) -> int:
    """The tokens that the model of a folder can hold, by `genai_config.json`.

    Raises:
        ModelError: the file is missing or damaged, or asks for more than the graph: libraries, other graphs, files that
            are written.
    """
    path = source.folder / "genai_config.json"
    try:
        model = read_json(path, unique=True)["model"]
        decoder, longest = model["decoder"], int(model["context_length"])
        session, graph = set(decoder.get("session_options", {})), decoder["filename"]
        parts = {name for name, part in model.items() if isinstance(part, dict)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{source.name!r}: it has no genai_config.json that onnxruntime-genai can use ({first_line(error)})"
        ) from error
    ours = {"custom_ops_library"} if source.needs_operator else set()  # the program's own takes its place
    more = [f"model.{name}" for name in sorted(parts - {"decoder"})]
    more += [f"model.decoder.{name}" for name in ("pipeline",) if name in decoder]
    more += [f"model.decoder.session_options.{name}" for name in sorted(session - _HARMLESS - ours)]
    more += [] if graph == GRAPH else [f"the graph {graph!r}"]
    if more:
        raise ModelError(
            f"{source.name!r}: {path.name} asks for {', '.join(more)}; of such a folder only {GRAPH} is loaded, "
            "with no library and no options of its session"
        )
    return longest
