"""What an ONNX folder is held against before it is put in place: torch's predictions, and the zeros of its layers."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from gblm_compress.errors import VerificationError
from gblm_compress.exporters.onnx_decoding import decode
from gblm_compress.exporters.onnx_weights import Place
from gblm_compress.measure.onnx_forward import OnnxForward
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.measure.runtimes import Generating
from gblm_compress.measure.torch_runtime import TorchRuntime
from gblm_compress.models.architecture import weight_matrix
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample

# Largest difference of a logit, relative to the largest logit: rounding through all layers, not per operation.
# Operators for levels round inputs to 16 bits, those for blocks to 8.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "levels": 1e-2, "blocks": 1e-1}
PROMPT_TOKENS = 16
GREEDY_TOKENS = 32


def verify(
    folder: Path, model: Any, sample: Sample, dtype: str, layers: list[str], places: dict[str, Place]
) -> dict[str, Any]:
    """Reopen the folder in ONNX Runtime and compare it with torch on a sample.

    Args:
        dtype: the entry of `TOLERANCE` that it is held to.
        layers: the pruned ones, whose zeros are counted in the graph.

    Raises:
        VerificationError: predictions or zeros differ.
    """
    zeros = _verify_zeros(folder, model, layers, places)
    reference = TorchRuntime(model)
    if not reference.task.generates:
        forward = OnnxForward(ModelSource(str(folder), folder), "cpu", torch.get_num_threads())
        difference = _check_logits(reference.predict(sample)[0], forward.predict(sample)[0], dtype, "read at once")
        tolerance = {"logits_relative_difference": difference, "logits_tolerance": TOLERANCE[dtype]}
        return {**tolerance, "provider": forward.provider, **zeros}
    runtime = OnnxRuntime(ModelSource(str(folder), folder), "cpu", torch.get_num_threads())
    at_once = _check_logits(reference.predict(sample)[0], runtime.predict(sample)[0], dtype, "read at once")
    expected, got = _decode_side_by_side(reference, runtime, sample["input_ids"][:, :PROMPT_TOKENS])
    one_by_one = _check_logits(expected, got, dtype, "decoded one by one")
    # Where torch's two largest logits are further apart than twice the largest difference, no error of that size turns
    # the choice; of two that are nearer either may win. An export whose errors leave nothing decided is of no use.
    largest = expected.topk(2).values
    decided = int((largest[:, 0] - largest[:, 1] > 2 * (expected - got).abs().max()).sum())
    if not decided:
        raise VerificationError(
            f"logits of ONNX Runtime and torch differ by {one_by_one:.2e} of the largest logit, more than the choice "
            f"of any of {GREEDY_TOKENS} tokens bears; export in float32"
        )
    return {
        "logits_relative_difference": max(at_once, one_by_one),
        "logits_tolerance": TOLERANCE[dtype],
        "greedy_tokens": GREEDY_TOKENS,
        "decided_greedy_tokens": decided,
        "identical_greedy_tokens": int((expected.argmax(-1) == got.argmax(-1)).sum()),
        "provider": runtime.provider,
        **zeros,
    }


def _decode_side_by_side(reference: Generating, runtime: Generating, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [GREEDY_TOKENS, vocabulary] of both, step by step through their KV caches, both fed the tokens that the
    reference chooses: so that every step can be compared, whatever the other would have chosen before."""
    ids, cache, other_cache = prompt, None, None
    expected, got = [], []
    for _ in range(GREEDY_TOKENS):
        logits, cache = reference.last_logits(ids, cache)
        other, other_cache = runtime.last_logits(ids, other_cache)
        expected.append(logits[0])
        got.append(other[0])
        ids = logits.argmax(-1, keepdim=True)
    return torch.stack(expected), torch.stack(got)


def _check_logits(expected: Tensor, got: Tensor, dtype: str, how: str) -> float:
    """The largest difference relative to the largest logit.

    Raises:
        VerificationError: it is more than the dtype allows.
    """
    difference = float((expected - got).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise VerificationError(
            f"logits of ONNX Runtime and torch differ by {difference:.2e} of the largest logit on {len(expected)} "
            f"tokens {how}; {TOLERANCE[dtype]:.0e} is allowed in {dtype}"
        )
    return difference


def _verify_zeros(folder: Path, model: nn.Module, layers: list[str], places: dict[str, Place]) -> dict[str, int]:
    """Count the zeros of every pruned layer in its initializer, as saved, against the layer."""
    initializers = ir.load(folder / GRAPH).graph.initializers
    decoded: dict[str, Any] = {}
    total = 0
    for layer in layers:
        expected = int((weight_matrix(model.get_submodule(layer)).detach() == 0).sum())
        if layer not in places:
            raise VerificationError(f"{layer}: no initializer of the graph holds its weight")
        place = places[layer]
        if place.initializer not in decoded:
            decoded = {place.initializer: decode(initializers, place.initializer, place.shape)}
        got = int((place.of(decoded[place.initializer]) == 0).sum())
        if got != expected:
            raise VerificationError(f"{layer}: {expected} zeros in the model, {got} in the graph's initializer")
        total += got
    return {"layers_checked": len(layers), "zeros": total}
