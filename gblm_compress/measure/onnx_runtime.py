"""ONNX Runtime on the exported folder of a model that generates."""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gblm_compress.measure.onnx_session import ONNX_TYPES, OnnxSession, kernels_of, other_interface
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample

_LOGITS = "logits"
_PAST = "past_key_values."
AT_ONCE = "gblm_tokens_at_once"
"""Key of a graph's metadata: the largest number of tokens that it reads in one call, where there is one."""
_OPTIONAL = ("attention_mask", "position_ids")
STATE = re.compile(r"_state(_\d+)?$")
"""How the names of inputs and outputs end that have one size, however many tokens there are."""


@dataclass
class _Cache:
    """A cache on the device.

    Attributes:
        values: of `_Interface.past`; keys and values in shared memory have room for more tokens.
        length: tokens that are in it.
    """

    values: list[Any]
    length: int


class OnnxRuntime:
    """ONNX Runtime on an exported folder; the KV cache stays on the device as OrtValues.

    A fused graph writes a step's keys and values into the memory of those before, which has room for more. A plain one
    makes all of them anew in every step.
    """

    def __init__(self, source: ModelSource, device: str, threads: int, *, profile: Sequence[int] = ()) -> None:
        import onnxruntime

        self._opened = OnnxSession(source, device, threads, profile=bool(profile))
        self._name, self._session = source.name, self._opened.session
        self.provider = self._opened.provider
        self._device, self._device_id = self._opened.device, self._opened.device_id
        self._ort_value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._interface = _Interface.of(self._session, source.name, source.operators)
        self.dtype = self._interface.dtype
        self._at_once = _at_once(self._session, source.name)
        counts = sorted(set(profile))
        self._kernels = self._opened.profiled(counts, self._calls_of) if counts else {}

    def predict(self, sample: Sample) -> Tensor:
        ids = sample["input_ids"]
        logits, _ = self._run(ids.numpy(), self._empty(len(ids)))
        return torch.from_numpy(logits).float()

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        return self._greedy(ids, None)

    def decode(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self._greedy(ids, cache)

    def last_logits(self, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids, cache)
        return torch.from_numpy(logits).float(), cache

    def step_ms(self) -> dict[str, float]:
        return self._opened.step_ms

    def kernels(self, tokens: int) -> dict[str, int]:
        return kernels_of(self._kernels, tokens)

    def _calls_of(self, tokens: int) -> int:
        """Read so many tokens, and say in how many calls of the graph."""
        self.prefill(torch.zeros(1, tokens, dtype=torch.int64))
        return -(-tokens // (self._at_once or tokens))

    def _greedy(self, ids: Tensor, cache: _Cache | None) -> tuple[Tensor, Any]:
        logits, cache = self._step(ids, cache)
        return torch.from_numpy(logits.argmax(-1, keepdims=True)), cache

    def _step(self, ids: Tensor, cache: _Cache | None) -> tuple[Any, _Cache]:
        cache = cache or self._empty(len(ids))
        if self._interface.shares_cache:
            cache = self._with_room(cache, ids)
        logits, cache = self._run(ids.numpy(), cache)
        return logits[:, -1], cache

    def _run(self, ids: Any, cache: _Cache) -> tuple[Any, _Cache]:
        """Logits [batch, tokens, vocabulary] of all tokens, in as many calls as the graph needs, and the cache."""
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
        in_place = self._interface.shares_cache and cache.values[0].shape()[2] > past
        with self._opened.named_errors("run"):
            binding = self._session.io_binding()
            for name in self._interface.takes:
                binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
            for name, value in zip(self._interface.past, cache.values, strict=True):
                binding.bind_ortvalue_input(name, value)
            binding.bind_output(_LOGITS, "cpu")
            for name, value in zip(self._interface.present, cache.values, strict=True):
                if in_place:
                    binding.bind_ortvalue_output(name, value)
                else:
                    binding.bind_output(name, self._device, self._device_id)
            self._session.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
            logits = logits.numpy()
        if logits.shape[:2] != ids.shape or logits.shape[2] <= ids.max():
            raise other_interface(
                self._name,
                f"for {batch} × {tokens} tokens up to number {ids.max()} output {_LOGITS!r} has the shape "
                f"{list(logits.shape)}; [{batch}, {tokens}, size of the vocabulary] is needed",
            )
        return logits, _Cache(cache.values if in_place else present, length)

    def _with_room(self, cache: _Cache, ids: Tensor) -> _Cache:
        """The cache with room for `ids` [batch, tokens]: itself, or a copy of twice the size that is needed."""
        tokens = ids.shape[1]
        if cache.values[0].shape()[2] >= cache.length + tokens:
            return cache
        room = 2 * (cache.length + tokens)
        wider = [
            np.pad(value.numpy(), [(0, 0), (0, 0), (0, room - value.shape()[2]), (0, 0)]) for value in cache.values
        ]
        return _Cache([self._ort_value(value, self._device, self._device_id) for value in wider], cache.length)

    def _empty(self, batch: int) -> _Cache:
        values = [
            self._ort_value(np.zeros((batch, *shape), dtype), self._device, self._device_id)
            for dtype, shape in self._interface.past.values()
        ]
        return _Cache(values, 0)


@dataclass(frozen=True)
class _Interface:
    """What a graph takes and gives, once it is known to be what an export of this program takes and gives.

    Attributes:
        dtype: of the logits.
        takes: the inputs beside the cache.
        past: {input of the cache: its dtype, and its shape before the first token, without the batch}. Keys and values
            are [heads, tokens, width], states of convolutions and recurrences have shapes of their own.
        present: the outputs that continue them, in the same order.
        shares_cache: whether the graph can write its outputs into the memory of the inputs that they continue.
    """

    dtype: str
    takes: tuple[str, ...]
    past: dict[str, tuple[str, tuple[int, ...]]]
    present: tuple[str, ...]
    shares_cache: bool

    @classmethod
    def of(cls, session: Any, model: str, operators: Container[str]) -> "_Interface":
        """Read the inputs and outputs of a session.

        Args:
            operators: of its graph.

        Raises:
            ModelError: one is missing, not known, or of another type or shape than an export has.
        """
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}

        def tensor(values: dict[str, Any], name: str, types: Iterable[str], rank: int | None) -> Any:
            what = f"{'input' if values is inputs else 'output'} {name!r}"
            if name not in values:
                raise other_interface(model, f"{what} is missing; it has {', '.join(values) or 'none'}")
            value = values[name]
            if value.type not in types:
                raise other_interface(model, f"{what} is a {value.type}; {' or '.join(types)} is needed")
            if rank is not None and len(value.shape) != rank:
                raise other_interface(model, f"{what} has the shape {value.shape}; {rank} dimensions are needed")
            return value

        logits = tensor(outputs, _LOGITS, ONNX_TYPES, 3)
        takes = ("input_ids", *(name for name in _OPTIONAL if name in inputs))
        for name in takes:
            tensor(inputs, name, ("tensor(int64)",), 2)
        past: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in (name for name in inputs if name not in takes):
            if not name.startswith(_PAST):
                raise other_interface(model, f"input {name!r} is not known")
            if is_state := bool(STATE.search(name)):
                value = tensor(inputs, name, ONNX_TYPES, None)
                shape = value.shape[1:]
            else:
                value = tensor(inputs, name, (logits.type,), 4)
                shape = [value.shape[1], 0, value.shape[3]]  # no token yet
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                which = "dimensions after the first" if is_state else "second and fourth dimension"
                raise other_interface(model, f"input {name!r} has the shape {value.shape}; its {which} must be numbers")
            past[name] = ONNX_TYPES[value.type], tuple(shape)
            tensor(outputs, _present(name), (value.type,), len(value.shape))
        if not past:
            raise other_interface(model, f"it has no input {_PAST}*, so that it cannot go on from a cache")
        shares = "GroupQueryAttention" in operators
        return cls(ONNX_TYPES[logits.type], takes, past, tuple(map(_present, past)), shares)


def has_recurrence(inputs: Iterable[str]) -> bool:
    """Whether a graph with these inputs carries the states of a recurrence on."""
    return any("recurrent_state" in name for name in inputs)


def _at_once(session: Any, model: str) -> int | None:
    """Raises:
    ModelError: what the graph says of it is no number of tokens.
    """
    said = session.get_modelmeta().custom_metadata_map.get(AT_ONCE)
    if said is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,8}", said):
        raise other_interface(model, f"metadata {AT_ONCE!r} is {said[:40]!r}; a number of tokens is needed")
    return int(said)


def _present(past: str) -> str:
    """The output that continues an input of the cache."""
    return "present." + past.removeprefix(_PAST)
