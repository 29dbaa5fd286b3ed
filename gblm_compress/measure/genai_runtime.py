"""onnxruntime-genai on an exported folder: its own loop, cache and choice of tokens around the same graph."""

import json
from contextlib import chdir
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.kernels import cpu
from gblm_compress.models.source import ModelSource
from gblm_compress.storage.records import read_json
from gblm_compress.tasks.task import Sample

ROOM = 1024
"""Tokens that the cache has room for beyond the prompt; the runtime allocates it whole."""


class GenaiRuntime:
    """A generation is a `Generator` of the library; it stands for the cache of the protocol."""

    def __init__(self, source: ModelSource, device: str, threads: int) -> None:
        import onnxruntime_genai

        self._library, self._name = onnxruntime_genai, source.name
        session: dict[str, Any] = {"intra_op_num_threads": threads}
        place = source.folder
        if source.needs_operator:
            # It loads a library from the model's folder or the working directory, and this program only its own.
            library = cpu.onnxruntime_library()
            session["custom_ops_library"], place = str(library), library.parent
        _check_config(source)
        self._operators = {f"{name} (onnxruntime-genai)": count for name, count in source.operators.items()}
        try:
            config = onnxruntime_genai.Config(str(source.folder.absolute()))
            config.clear_providers()
            if device != "cpu":
                config.append_provider("cuda")
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            with chdir(place):
                self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise ModelError(f"{source.name!r}: onnxruntime-genai cannot load it ({str(error)[:300]})") from error
        self._longest = source.config["max_position_embeddings"]
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
        longest = min(self._longest, tokens + ROOM)
        options.set_search_options(batch_size=batch, max_length=longest, do_sample=False)
        try:
            generator = self._library.Generator(self._model, options)
            generator.append_tokens(ids.int().numpy())
        except RuntimeError as error:
            raise ModelError(f"{self._name!r}: onnxruntime-genai cannot run it ({str(error)[:300]})") from error
        return generator


def _check_config(source: ModelSource) -> None:
    """Raises:
    ModelError: `genai_config.json` is missing or damaged, or names a library of native code that would be loaded.
    """
    path = source.folder / "genai_config.json"
    try:
        config = read_json(path)
        if source.needs_operator:  # the program's own takes its place
            config["model"]["decoder"]["session_options"].pop("custom_ops_library", None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.name!r}: it has no genai_config.json that onnxruntime-genai can use") from error
    if "custom_ops_library" in json.dumps(config):
        raise ModelError(f"{source.name!r}: {path.name} names a library of native code; it is not loaded")
