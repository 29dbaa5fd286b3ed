"""Verifies an ONNX folder before it is put in place: its predictions and zeros must be the model's in torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from gblm_compress.errors import VerificationError
from gblm_compress.exporters.onnx_packing import LEVELS, MASK, ROWS, SCALES, VALUES
from gblm_compress.exporters.onnx_rounding import BLOCK_SCALES, BLOCKS, CHANNEL_SCALES, CHANNELS, Blocks, Channels
from gblm_compress.exporters.onnx_weights import Place
from gblm_compress.kernels import cpu
from gblm_compress.kernels.masks import WORD
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.measure.onnx_runtime import OnnxForward, OnnxRuntime
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample

# Largest difference of a logit, relative to the largest logit: rounding through all layers, not per operation.
# Inputs of levels have 16 bits and those of blocks float32, if operators are told so or tokens are few; else 8 bits.
# Spread levels have 8 bits of few tokens too.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "levels": 1e-2, "blocks": 1e-3, "inputs of 8 bits": 1e-1}
MOST_TOKENS = 0.95  # Eight bits may turn a token that the model hardly decides to attend to; with more, all must agree.
BROKEN = "; export in float32, or prune with a fit: a model that pruning has broken moves with every rounding"
PROMPT_TOKENS = 16
GREEDY_TOKENS = 32


def verify(
    exported: ModelSource, model: Any, sample: Sample, dtype: str, zeros: Mapping[str, int], places: dict[str, Place]
) -> dict[str, Any]:
    """Reopen a folder in ONNX Runtime; compare predictions with torch, and each layer's `zeros` with the file.

    `dtype` is an entry of `TOLERANCE`.
    """
    counted = _verify_zeros(exported.folder, zeros, places)
    reference = TorchRuntime(model)
    engine: Any = OnnxRuntime if reference.task.generates else OnnxForward
    predicted, where = reference.predict(sample)[0], ("cpu", torch.get_num_threads())
    rounded, share = "inputs of 8 bits" if dtype in ("levels", "blocks") else dtype, 1.0
    if rounded != dtype and "DynamicQuantizeMatMul" not in exported.operators:
        with _exact(exported.folder / GRAPH):
            exact = engine(exported, *where).predict(sample)[0]
        _check_logits(predicted, exact, dtype, "read at once")
        share = MOST_TOKENS
    runtime = engine(exported, *where)
    difference = _check_logits(predicted, runtime.predict(sample)[0], rounded, "read at once", share)
    tokens: dict[str, int] = {}
    if reference.task.generates:
        wide = dtype == "levels" and not (_has_places(exported.folder) and cpu.spreads_places())
        length, decoded, share = (cpu.FEW_TOKENS, dtype, 1.0) if wide else (PROMPT_TOKENS, rounded, share)
        expected, got = _decoded(reference, runtime, sample["input_ids"][:, :length])
        one_by_one = _check_logits(expected, got, decoded, "decoded one by one", share)
        # A choice is decided if torch's two largest logits are further apart than twice the largest difference: no
        # error of that size can turn it. An export without decided choices is of no use.
        largest = expected.topk(2).values
        decided = int((largest[:, 0] - largest[:, 1] > 2 * (expected - got).abs().max()).sum())
        if not decided:
            raise VerificationError(
                f"logits of ONNX Runtime and torch differ by {one_by_one:.2e} of the largest logit, too much to "
                f"decide any of {GREEDY_TOKENS} tokens; export in float32"
            )
        same = int((expected.argmax(-1) == got.argmax(-1)).sum())
        tokens = {"greedy_tokens": GREEDY_TOKENS, "decided_greedy_tokens": decided, "identical_greedy_tokens": same}
        difference = max(difference, one_by_one)
    checks = {"logits_relative_difference": difference, "logits_tolerance": TOLERANCE[rounded], **tokens}
    return {**checks, "provider": runtime.provider, **counted}


def _decoded(reference: TorchRuntime, runtime: OnnxRuntime, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [GREEDY_TOKENS, vocabulary] of both: ONNX Runtime decodes its most likely tokens, torch reads them."""
    ids, (logits, cache) = prompt, runtime.last_logits(prompt, None)
    got = [logits[0]]
    while len(got) < GREEDY_TOKENS:
        token = logits.argmax(-1, keepdim=True)
        logits, cache = runtime.last_logits(token, cache)
        ids = torch.cat([ids, token], 1)
        got.append(logits[0])
    return reference.predict({"input_ids": ids})[0, -GREEDY_TOKENS:], torch.stack(got)


@contextmanager
def _exact(path: Path) -> Iterator[None]:
    """Let no operator of a graph round its inputs to 8 bits while the `with` runs."""
    stored = path.read_bytes()
    graph = onnx.load_from_string(stored)
    for node in graph.graph.node:
        if node.op_type in ("MatMulNBits", "QuantisedLinear"):
            levels = [attribute for attribute in node.attribute if attribute.name == "accuracy_level"]
            (levels or [node.attribute.add(name="accuracy_level", type=onnx.AttributeProto.INT)])[0].i = 0
    path.write_bytes(graph.SerializeToString())
    try:
        yield
    finally:
        path.write_bytes(stored)


def _check_logits(expected: Tensor, got: Tensor, dtype: str, how: str, share: float = 1.0) -> float:
    """The largest difference of a logit, relative to the largest, on this share of the tokens."""
    each = ((expected - got).abs() / expected.abs().max()).reshape(len(expected), -1).amax(1)
    difference = float(each.quantile(share))
    if not difference <= TOLERANCE[dtype]:
        raise VerificationError(
            f"logits of ONNX Runtime and torch differ by {difference:.2e} of the largest logit on {len(expected)} "
            f"tokens {how}; {TOLERANCE[dtype]:.0e} is allowed in {dtype}{'' if dtype == 'float32' else BROKEN}"
        )
    return difference


def _has_places(folder: Path) -> bool:
    """Whether weights have 4 bits: places in tables of levels."""
    initializers = ir.load(folder / GRAPH).graph.initializers
    return any(name.endswith(LEVELS) and value.const_value.size for name, value in initializers.items())


def _verify_zeros(folder: Path, zeros: Mapping[str, int], places: dict[str, Place]) -> dict[str, int]:
    initializers = ir.load(folder / GRAPH).graph.initializers
    decoded: dict[str, Any] = {}
    for layer, expected in zeros.items():
        if layer not in places:
            raise VerificationError(f"{layer}: no initializer of the graph holds its weight")
        place = places[layer]
        if place.initializer not in decoded:
            decoded = {place.initializer: decode(initializers, place.initializer, place.shape)}
        got = int((place.of(decoded[place.initializer]) == 0).sum())
        if got != expected:
            raise VerificationError(f"{layer}: {expected} zeros in the model, {got} in the graph's initializer")
    return {"layers_checked": len(zeros), "zeros": sum(zeros.values())}


def decode(initializers: Any, name: str, shape: tuple[int, ...]) -> Any:
    """The weight of an initializer of that shape, [in_features, out_features] or the other way round, from any form."""

    def stored(suffix: str) -> Any:
        return initializers[name + suffix].const_value.numpy()

    if name in initializers:
        return stored("")
    if name + ROWS in initializers:
        return stored(ROWS).T
    if name + SCALES in initializers:
        arrays = {"scales": stored(SCALES).view("int16"), "mask": stored(MASK), "values": stored(VALUES)}
        if (levels := stored(LEVELS)).size:
            return _unpacked("bitmask-int4", **arrays, levels=levels.reshape(-1, 16))
        return _unpacked("bitmask-int8", **arrays)
    for bits, suffix in BLOCKS.items():
        if name + suffix in initializers:
            return Blocks(stored(suffix), stored(BLOCK_SCALES), bits, shape[0]).dense_weight().numpy().T
    if name + CHANNELS in initializers:
        return Channels(stored(CHANNELS), stored(CHANNEL_SCALES)).dense_weight().numpy().T
    return _unpacked("bitmask", mask=stored(MASK), values=stored(VALUES))


def _unpacked(layout: str, **arrays: Any) -> Any:
    parts = {name: torch.tensor(array) for name, array in arrays.items()}
    mask = parts["mask"]
    layer = PackedLinear.holding(layout, (len(mask), mask.shape[-1] * WORD), parts)
    layer.check()
    return layer.dense_weight().numpy().T
