"""ONNX graphs around the operators gblm, sound and damaged: `python -m tests.hostile_graphs LIBRARY GRAPHS SEED`."""

import os
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import helper, numpy_helper

from gblm_compress.kernels import cpu

PADDING, MAX_WEIGHTS = 64, 8
ROLES = ("x", "mask", "values", "starts", "weight", "scales", "levels")
GROUPS = (32, 64, 128)
EDGES = (-(2**63), -1, 1, 64, 2**31, 2**40, 2**63 - 1)


@dataclass
class Case:
    """One node, and what it is given.

    Attributes:
        tensors: `x`, and the weights by name: `mask0`, `values0`, `starts0` or `scales0`, `levels0`, …; or `weight0`.
        outputs, inputs: those of the node, in order.
        variable: those tensors that are inputs of the graph rather than initializers.
        damages: what was done to it.
        attributes: those of the node; accuracy_level 0 keeps 16 bits.
    """

    operator: str
    tensors: dict[str, np.ndarray]
    outputs: list[str] = field(default_factory=lambda: ["y0"])
    inputs: list[str] = field(init=False)
    variable: set[str] = field(default_factory=lambda: {"x"})
    damages: list[str] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = list(self.tensors)

    def model(self) -> bytes:
        kind = helper.np_dtype_to_tensor_dtype
        initializers = [
            numpy_helper.from_array(array, name) for name, array in self.tensors.items() if name not in self.variable
        ]
        given = [helper.make_tensor_value_info(name, kind(a.dtype), None) for name, a in self.feeds().items()]
        made = [helper.make_tensor_value_info(name, kind(np.dtype("f4")), None) for name in self.outputs if name]
        node = helper.make_node(self.operator, self.inputs, self.outputs, domain="gblm", **self.attributes)
        graph = helper.make_graph([node], "one", given, made, initializers)
        opsets = [helper.make_opsetid("gblm", 3), helper.make_opsetid("", 20)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def feeds(self) -> dict[str, np.ndarray]:
        return {name: self.tensors[name] for name in sorted(self.variable)}

    def products(self) -> list[np.ndarray]:
        """What a graph that is taken must compute; an error where nobody could."""
        roles, _, restored = OPERATORS[self.operator]
        x, *given = (self.tensors[name] for name in self.inputs)
        if self.operator == "QuantisedLinear":
            tables = [levels for _, _, _, levels in zip(*[iter(given)] * 4, strict=True)]
            few_too = cpu.spreads_places() and all(len(levels) == 16 for levels in tables)
            x = rounded(x, (few_too or eight_bits(x.size // x.shape[-1])) and not self.attributes)
        x = x.astype(np.float64)
        return [x @ restored(*given[at : at + len(roles)]).T for at in range(0, len(given), len(roles))]


def eight_bits(tokens: int, path: str | None = None) -> bool:
    """Whether x has 8 bits: with many tokens on x86."""
    return tokens > cpu.FEW_TOKENS and (path or cpu.path.__wrapped__(torch.int8)).startswith(("avx", "vnni"))


def _alive(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little").astype(bool)


def _scattered(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    dense = np.zeros(_alive(mask).shape)
    dense[_alive(mask)] = values
    return dense


def rounded(x: np.ndarray, eight: bool) -> np.ndarray:
    """x [..., columns] as kernels for levels take it: in 8 bits by 32 columns, or in 16 with one scale a row."""
    if not x.size:
        return x
    columns, most = x.shape[-1], np.float32(127 if eight else 32767)
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % 32)]).reshape(*x.shape[:-1], -1, 32) if eight else x
    largest = np.abs(blocks).max(-1, keepdims=True, initial=0).astype(np.float32)
    inverse = np.divide(most, largest, where=largest > 0, out=np.zeros_like(largest))
    levels = np.rint(blocks.astype(np.float64) * inverse)  # as a fused multiply-add does: the product is not rounded
    return (levels * (largest / most)).reshape(*x.shape[:-1], -1)[..., :columns]


def restored(mask: np.ndarray, values: np.ndarray, scales: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The quantised weight that is sound, in float64."""
    if not mask.size:
        weight = values.astype(np.float64)
    elif not levels.size:
        weight = _scattered(mask, values[:-PADDING])
    else:
        words = _alive(mask).reshape(-1, 64)
        taken = (words.sum(1) + 1) // 2 * 2  # a word's places begin in a byte of their own
        at = ((np.cumsum(taken) - taken)[:, None] + np.cumsum(words, 1) - 1)[words]
        places = np.stack([values & 15, values >> 4], 1).ravel()[at]
        rows = np.nonzero(_alive(mask))[0]
        weight = _scattered(mask, levels.reshape(-1, 16)[rows * (len(levels) > 16), places])
    columns, groups = weight.shape[1], scales.shape[1]
    group = columns if groups == 1 else next(size for size in GROUPS if -(-columns // size) == groups)
    return weight * np.repeat(scales.astype(np.float64), group, axis=1)[:, :columns]


def _random_mask(numbers: np.random.Generator, rows: int, words: int) -> np.ndarray:
    alive = numbers.random((rows, words * 64)) < numbers.choice((0, 0.1, 0.5, 1))
    return np.packbits(alive, axis=1, bitorder="little").view(np.int64)


def _bitmask_weight(numbers: np.random.Generator, rows: int, words: int, dtype: Any) -> list[np.ndarray]:
    mask = _random_mask(numbers, rows, words)
    counts = _alive(mask).sum(1)
    values = np.append(numbers.normal(size=counts.sum()), np.zeros(PADDING)).astype(dtype)
    return [mask, values, np.cumsum(counts) - counts]


def _quantised_weight(numbers: np.random.Generator, rows: int, words: int, _: Any) -> list[np.ndarray]:
    groups = numbers.choice([1, *(-(-words * 64 // group) for group in GROUPS)])
    scales = numbers.uniform(0, 0.02, size=(rows, groups)).astype(np.float16)
    kind = numbers.choice(("dense", "int8", "int4", "int4 by row"))
    nothing = np.zeros(0, np.int8)
    if kind == "dense":
        values = numbers.integers(-127, 128, size=(rows, words * 64), dtype=np.int8)
        return [np.zeros((0, 0), np.int64), values, scales, nothing]
    mask = _random_mask(numbers, rows, words)
    counts = np.bitwise_count(mask.view(np.uint64)).astype(np.int64)
    if kind == "int8":
        values = np.append(numbers.integers(-127, 128, size=counts.sum()), np.zeros(PADDING)).astype(np.int8)
        return [mask, values, scales, nothing]
    levels = numbers.integers(-127, 128, size=16 if kind == "int4" else 16 * rows, dtype=np.int8)
    values = np.append(numbers.integers(0, 256, size=((counts + 1) // 2).sum()), np.zeros(PADDING)).astype(np.uint8)
    return [mask, values, scales, levels]


OPERATORS: dict[str, tuple[tuple[str, ...], Callable[..., list[np.ndarray]], Callable[..., np.ndarray]]] = {
    "DenseLinear": (
        ("weight",), lambda numbers, rows, words, dtype: [numbers.normal(size=(rows, words * 64)).astype(dtype)],
        lambda weight: weight.astype(np.float64),
    ),
    "BitmaskLinear": (
        ("mask", "values", "starts"), _bitmask_weight, lambda mask, values, starts: _scattered(mask, values[:-PADDING]),
    ),
    "QuantisedLinear": (("mask", "values", "scales", "levels"), _quantised_weight, restored),
}  # fmt: skip
"""{operator: the tensors of a weight, what makes random ones, and the dense matrix of a weight in float64}."""


def sound_case(pick: random.Random, operators: Sequence[str] = tuple(OPERATORS)) -> Case:
    numbers = np.random.default_rng(pick.getrandbits(32))
    operator, words, dtype = pick.choice(operators), pick.randint(1, 3), pick.choice((np.float32, np.float16))
    leading = pick.choice(((), (1,), (0,), (3,), (8,), (9,), (2, 7), (129,), (1,) * 7, (2, 0, 3)))
    roles, made, _ = OPERATORS[operator]
    tensors = {"x": numbers.normal(size=(*leading, words * 64)).astype(np.float32)}
    count = 1 if operator == "DenseLinear" else pick.choice((1, 1, 2, 3, MAX_WEIGHTS))
    for index in range(count):
        parts = made(numbers, pick.choice((1, 2, 5, 17, 40)), words, dtype)
        tensors |= {f"{role}{index}": part for role, part in zip(roles, parts, strict=True)}
    attributes = {"accuracy_level": 0} if operator == "QuantisedLinear" and pick.random() < 0.5 else {}
    return Case(operator, tensors, [f"y{index}" for index in range(count)], attributes=attributes)


_EMPTY = ((0,), (0, 5), (5, 0), (2**40, 0), (0, 2**40), (2**30, 0, 2**20, 64))
_KINDS = (np.int8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64, np.uint8, np.bool_)
CHANGES: list[tuple[tuple[str, ...], Callable[[np.ndarray, random.Random], Any]]] = [
    (("mask",), lambda a, pick: a ^ (1 << pick.randrange(8 * a.itemsize - 1))),
    (("mask",), lambda a, pick: np.full_like(a, pick.choice((0, -1)))),
    (("mask", "x"), lambda a, pick: np.repeat(a, 2, axis=1)),
    (("starts",), lambda a, pick: np.where(np.arange(a.size) == pick.randrange(a.size), pick.choice(EDGES), a)),
    (("starts",), lambda a, pick: np.flip(a)),
    (ROLES, lambda a, pick: np.pad(a, [(0, pick.randint(1, 99))] + [(0, 0)] * (a.ndim - 1))),
    (ROLES, lambda a, pick: a[: pick.choice((0, len(a) // 2, -1))]),
    (ROLES, lambda a, pick: a[..., : pick.choice((0, -1))]),
    (ROLES, lambda a, pick: a.astype(pick.choice(_KINDS))),
    (ROLES, lambda a, pick: a.reshape(pick.choice(((-1,), (1, -1), (-1, 1), (*a.shape, 1), (1,) * 9 + a.shape)))),
    (ROLES, lambda a, pick: a.T),
    (ROLES, lambda a, pick: np.zeros(pick.choice(_EMPTY), a.dtype)),
    (ROLES, lambda a, pick: a.flat[0]),
]
"""Changes to tensors of some roles. A tensor that a change does not fit stays as it is."""


def _tensor(case: Case, pick: random.Random) -> None:
    name = pick.choice(("x", *pick.choices(list(case.tensors), k=4)))
    change = pick.choice([change for roles, change in CHANGES if name.startswith(roles)])
    with np.errstate(all="ignore"), suppress(TypeError, ValueError, IndexError, MemoryError, OverflowError):
        case.tensors[name] = np.array(change(case.tensors[name], pick), order="C")


def _variable(case: Case, pick: random.Random) -> None:
    case.variable ^= {pick.choice(list(case.tensors))}


def _names(case: Case, pick: random.Random) -> None:
    """Up to two neighbours among the inputs or outputs go, or others take their place."""
    names = pick.choice((case.inputs, case.inputs, case.outputs))
    at, others = pick.randrange(len(names)), [*names, "", "x", "more"]
    names[at : at + pick.randint(0, 2)] = pick.choices(others, k=pick.choice((0, 1, 1, 2, 28)))


DAMAGES = (*[_tensor] * 8, _variable, *[_names] * 2)


def run(case: Case, library: str) -> str:
    """Run a case: "" if the product is right, else ONNX Runtime's error. A wrong answer is an AssertionError."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # each tensor in a buffer of its own size
    options.register_custom_ops_library(library)
    try:
        session = onnxruntime.InferenceSession(case.model(), options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        got = session.run(None, {name: array for name, array in case.feeds().items() if name in wanted})
    except Exception as error:  # its kinds share no base
        return str(error)
    for y, expected in zip(got, case.products(), strict=True):
        # without a fused multiply-add an input half way between two steps of 16 bits may go either way
        tolerance = 1e-3 if case.operator == "QuantisedLinear" else 1e-4
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=tolerance, err_msg=str(case.damages))
    return ""


def run_many(count: int, library: str, seed: int = 0) -> int:
    """Run that many cases, one in four as it should be, the others with up to three damages; how many were refused.

    If GBLM_COMPRESS_KERNEL names a path that only quantised weights have, all cases are of their operator.
    """
    pick, refused = random.Random(seed), 0
    forced = os.environ.get(cpu.PATH_VARIABLE)
    any_weight = forced is None or forced in cpu.paths(torch.float32)
    for number in range(count):
        case = sound_case(pick, tuple(OPERATORS) if any_weight else ("QuantisedLinear",))
        for damage in pick.choices(DAMAGES, k=number % 4):
            if case.outputs and case.inputs:
                damage(case, pick)
                case.damages.append(damage.__name__)
        error = run(case, library)
        assert case.damages or not error, error
        refused += bool(error)
    return refused


def main() -> None:
    library, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(f"operator: {count:,} graphs, {run_many(count, library, seed):,} of them refused, the others computed right")


if __name__ == "__main__":
    main()
