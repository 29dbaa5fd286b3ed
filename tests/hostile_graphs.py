"""ONNX graphs around the operators gblm, sound and damaged: `python -m tests.hostile_graphs LIBRARY GRAPHS SEED`."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper, numpy_helper

PADDING, MAX_WEIGHTS, MAX_RANK = 64, 8, 8
ROLES = ("x", "mask", "values", "starts", "weight", "scales", "levels")
VALUES = (np.float32, np.float16)
SIZES = {"DenseLinear": 1, "BitmaskLinear": 3, "QuantisedLinear": 4}  # tensors of a weight
GROUPS = (32, 64, 128)
QUANTISED, LEVELS, MOST_COLUMNS = ("mask", "values", "scales", "levels"), (np.int8, np.uint8), 1 << 16
EDGES = (-(2**63), -1, 1, 64, 2**31, 2**40, 2**63 - 1)


@dataclass
class Case:
    """One node, and what it is given.

    Attributes:
        tensors: the packed weights by name: `mask0`, `values0`, `starts0` or `scales0`, `levels0`, …; or `weight`.
        inputs, outputs: those of the node, in order.
        variable: those tensors that are inputs of the graph rather than initializers.
        damages: what was done to it.
    """

    operator: str
    x: np.ndarray
    tensors: dict[str, np.ndarray]
    inputs: list[str]
    outputs: list[str]
    variable: set[str]
    damages: list[str]

    def model(self) -> bytes:
        kind = helper.np_dtype_to_tensor_dtype
        initializers = [
            numpy_helper.from_array(array, name) for name, array in self.tensors.items() if name not in self.variable
        ]
        given = [helper.make_tensor_value_info(name, kind(a.dtype), None) for name, a in self.feeds().items()]
        made = [helper.make_tensor_value_info(name, kind(np.dtype("f4")), None) for name in self.outputs if name]
        node = helper.make_node(self.operator, self.inputs, self.outputs, domain="gblm")
        graph = helper.make_graph([node], "one", given, made, initializers)
        opsets = [helper.make_opsetid("gblm", 3), helper.make_opsetid("", 20)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def feeds(self) -> dict[str, np.ndarray]:
        return {"x": self.x} | {name: self.tensors[name] for name in sorted(self.variable)}

    def weights(self) -> list[list[np.ndarray]]:
        given = [self.tensors[name] for name in self.inputs[1:]]
        size = SIZES[self.operator]
        return [given[first : first + size] for first in range(0, len(given), size)]

    def is_sound(self) -> bool:
        """Whether the operator must take it: its rules, written again."""
        if not self.inputs or self.inputs[0] != "x" or not all(self.outputs):
            return False
        if not all(name in self.tensors for name in self.inputs[1:]) or self.variable & set(self.inputs):
            return False
        weights, most = self.weights(), 1 if self.operator == "DenseLinear" else MAX_WEIGHTS
        if self.x.dtype != np.float32 or not 1 <= self.x.ndim <= MAX_RANK or not 1 <= len(self.outputs) <= most:
            return False
        if len(self.inputs) - 1 != SIZES[self.operator] * len(self.outputs):
            return False
        if self.operator == "BitmaskLinear" and len({values.dtype for _, values, _ in weights}) > 1:
            return False
        columns = {"DenseLinear": _dense_columns, "BitmaskLinear": _bitmask_columns, "QuantisedLinear": _columns}
        return all(columns[self.operator](*weight) == self.x.shape[-1] for weight in weights)

    def products(self) -> list[np.ndarray]:
        if self.operator == "QuantisedLinear":
            return [_rounded(self.x) @ restored(*weight).T for weight in self.weights()]
        x = self.x.astype(np.float64)
        if self.operator == "DenseLinear":
            return [x @ weight.astype(np.float64).T for (weight,) in self.weights()]
        return [x @ _scattered(mask, values[:-PADDING]).T for mask, values, _ in self.weights()]


def _alive(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little").astype(bool)


def _mask(alive: np.ndarray) -> np.ndarray:
    return np.packbits(alive, axis=1, bitorder="little").view(np.int64)


def _scattered(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    dense = np.zeros(_alive(mask).shape)
    dense[_alive(mask)] = values
    return dense


def _dense_columns(weight: np.ndarray) -> int | None:
    """How many columns a weight has; None where it is none."""
    is_weight = weight.dtype in VALUES and weight.ndim == 2 and 0 not in weight.shape and weight.shape[1] % 64 == 0
    return weight.shape[1] if is_weight else None


def _bitmask_columns(mask: np.ndarray, values: np.ndarray, starts: np.ndarray) -> int | None:
    if mask.dtype != np.int64 or values.dtype not in VALUES or starts.dtype != np.int64:
        return None
    if (mask.ndim, values.ndim, starts.ndim) != (2, 1, 1) or 0 in mask.shape:
        return None
    counts = np.bitwise_count(mask.view(np.uint64)).sum(1).astype(np.int64)
    fits = np.array_equal(starts, np.cumsum(counts) - counts) and len(values) == counts.sum() + PADDING
    return 64 * mask.shape[1] if fits else None


def _columns(mask: np.ndarray, values: np.ndarray, scales: np.ndarray, levels: np.ndarray) -> int | None:
    if (mask.dtype, scales.dtype, levels.dtype) != (np.int64, np.float16, np.int8) or values.dtype not in LEVELS:
        return None
    places = values.dtype == np.uint8
    if (mask.ndim, scales.ndim, levels.ndim) != (2, 2, 1):
        return None
    if mask.shape == (0, 0):
        if places or values.ndim != 2 or 0 in values.shape or values.shape[1] % 64:
            return None
        rows, columns = values.shape
    else:
        rows, columns = mask.shape[0], 64 * mask.shape[1]
        counts = np.bitwise_count(mask.view(np.uint64)).astype(np.int64)
        stored = ((counts + 1) // 2 if places else counts).sum()
        if 0 in mask.shape or values.ndim != 1 or len(values) != stored + PADDING:
            return None
    if columns > MOST_COLUMNS or len(levels) not in ((16, 16 * rows) if places else (0,)) or len(scales) != rows:
        return None
    return columns if scales.shape[1] in (1, *(-(-columns // group) for group in GROUPS)) else None


def _rounded(x: np.ndarray) -> np.ndarray:
    """x as the operator for quantised weights takes it: in 16 bits, with one scale for each token."""
    step = np.abs(x).max(-1, keepdims=True, initial=0).astype(np.float64) / 32767
    return np.rint(x / np.where(step > 0, step, 1)) * step


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


def _quantised_weight(numbers: np.random.Generator, pick: random.Random, rows: int, words: int) -> list[np.ndarray]:
    """Mask, values, scales and levels of a weight."""
    groups = pick.choice([1, *(-(-words * 64 // group) for group in GROUPS)])
    scales = numbers.uniform(0, 0.02, size=(rows, groups)).astype(np.float16)
    kind = pick.choice(("dense", "int8", "int4", "int4 by row"))
    nothing = np.zeros(0, np.int8)
    if kind == "dense":
        values = numbers.integers(-127, 128, size=(rows, words * 64), dtype=np.int8)
        return [np.zeros((0, 0), np.int64), values, scales, nothing]
    alive = numbers.random((rows, words * 64)) < pick.choice((0, 0.1, 0.5, 1))
    mask = _mask(alive)
    counts = np.bitwise_count(mask.view(np.uint64)).astype(np.int64)
    stored = counts.sum() if kind == "int8" else ((counts + 1) // 2).sum()
    padding = np.zeros(PADDING, np.int8)
    if kind == "int8":
        return [mask, np.append(numbers.integers(-127, 128, size=stored, dtype=np.int8), padding), scales, nothing]
    levels = numbers.integers(-127, 128, size=16 if kind == "int4" else 16 * rows, dtype=np.int8)
    values = np.append(numbers.integers(0, 256, size=stored, dtype=np.uint8), padding.view(np.uint8))
    return [mask, values, scales, levels]


def sound_case(pick: random.Random) -> Case:
    numbers = np.random.default_rng(pick.getrandbits(32))
    words, dtype, rows = pick.randint(1, 3), pick.choice(VALUES), (1, 2, 5, 17, 40)
    leading = pick.choice(((), (1,), (0,), (3,), (8,), (9,), (2, 7), (129,), (1,) * 7, (2, 0, 3)))
    x = numbers.normal(size=(*leading, words * 64)).astype(np.float32)
    if pick.random() < 0.25:
        weight = numbers.normal(size=(pick.choice(rows), words * 64)).astype(dtype)
        return Case("DenseLinear", x, {"weight": weight}, ["x", "weight"], ["y0"], set(), [])
    count = pick.choice((1, 1, 2, 3, MAX_WEIGHTS))
    outputs = [f"y{index}" for index in range(count)]
    tensors: dict[str, np.ndarray] = {}
    if pick.random() < 0.4:
        for index in range(count):
            parts = _quantised_weight(numbers, pick, pick.choice(rows), words)
            tensors |= dict(zip([f"{role}{index}" for role in QUANTISED], parts, strict=True))
        return Case("QuantisedLinear", x, tensors, ["x", *tensors], outputs, set(), [])
    for index in range(count):
        alive = numbers.random((pick.choice(rows), words * 64)) < pick.choice((0, 0.1, 0.5, 1))
        counts = alive.sum(1)
        tensors[f"mask{index}"] = _mask(alive)
        tensors[f"values{index}"] = np.append(numbers.normal(size=alive.sum()), np.zeros(PADDING)).astype(dtype)
        tensors[f"starts{index}"] = np.cumsum(counts) - counts
    return Case("BitmaskLinear", x, tensors, ["x", *tensors], outputs, set(), [])


_EMPTY = ((0,), (0, 5), (5, 0), (2**40, 0), (0, 2**40), (2**30, 0, 2**20, 64))
_KINDS = (np.int8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64, np.uint8, np.bool_)


def _other_start(starts: np.ndarray, pick: random.Random) -> np.ndarray:
    changed = starts.copy()
    changed.flat[pick.randrange(starts.size)] = pick.choice(EDGES)
    return changed


def _other_shape(a: np.ndarray, pick: random.Random) -> np.ndarray:
    shapes: list[Any] = [(-1,), (1, -1), (-1, 1), (1, 1, -1), (*a.shape, 1), (1,) * 9 + a.shape]
    return a.reshape(pick.choice(shapes))


CHANGES: list[tuple[tuple[str, ...], Callable[[np.ndarray, random.Random], Any]]] = [
    (("mask",), lambda a, pick: a ^ (1 << pick.randrange(63))),
    (("mask",), lambda a, pick: np.full_like(a, pick.choice((0, -1)))),
    (("mask", "x"), lambda a, pick: np.repeat(a, 2, axis=1)),
    (("starts",), _other_start),
    (("starts",), lambda a, pick: np.flip(a)),
    (ROLES, lambda a, pick: np.pad(a, [(0, pick.randint(1, 99))] + [(0, 0)] * (a.ndim - 1))),
    (ROLES, lambda a, pick: a[: pick.choice((0, len(a) // 2, -1))]),
    (ROLES, lambda a, pick: a[..., : pick.choice((0, -1))]),
    (ROLES, lambda a, pick: a.astype(pick.choice(_KINDS))),
    (ROLES, _other_shape),
    (ROLES, lambda a, pick: a.T),
    (ROLES, lambda a, pick: np.zeros(pick.choice(_EMPTY), a.dtype)),
    (ROLES, lambda a, pick: a.flat[0]),
]
"""Changes to tensors of some roles. A tensor that a change does not fit stays as it is."""


def _tensor(case: Case, pick: random.Random) -> None:
    name = pick.choice(("x", *pick.choices(list(case.tensors), k=4)))
    change = pick.choice([change for roles, change in CHANGES if name.startswith(roles)])
    with np.errstate(all="ignore"), suppress(TypeError, ValueError, IndexError, MemoryError):
        changed = np.array(change(case.x if name == "x" else case.tensors[name], pick), order="C")
        case.x, case.tensors = (changed, case.tensors) if name == "x" else (case.x, case.tensors | {name: changed})


def _variable(case: Case, pick: random.Random) -> None:
    case.variable.add(pick.choice(list(case.tensors)))


def _inputs(case: Case, pick: random.Random) -> None:
    given, at = case.inputs, pick.randrange(len(case.inputs))
    match pick.choice(("drop", "twice", "swap", "nothing", "x", "all")):
        case "drop":
            del given[at]
        case "twice":
            given.insert(at, given[at])
        case "swap":
            other = pick.randrange(len(given))
            given[at], given[other] = given[other], given[at]
        case "all":
            given += given[1:] * pick.randint(1, 9)
        case name:
            given[at] = "x" if name == "x" else ""


def _outputs(case: Case, pick: random.Random) -> None:
    match pick.choice(("drop", "more", "nothing")):
        case "drop":
            case.outputs.pop()
        case "more":
            case.outputs += [f"more{index}" for index in range(pick.randint(1, 9))]
        case "nothing":
            case.outputs[pick.randrange(len(case.outputs))] = ""


DAMAGES = (*[_tensor] * 8, _variable, _inputs, _outputs)


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """That many cases: one in four as it should be, the others with up to three damages."""
    pick = random.Random(seed)
    for number in range(count):
        case = sound_case(pick)
        for damage in pick.choices(DAMAGES, k=number % 4):
            if case.outputs and case.inputs:
                damage(case, pick)
                case.damages.append(damage.__name__)
        yield case


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
        assert not case.is_sound(), (case.damages, error)
        return str(error)
    assert case.is_sound(), case.damages
    for y, expected in zip(got, case.products(), strict=True):
        # an input half way between two steps of 16 bits may go either way
        tolerance = 1e-3 if case.operator == "QuantisedLinear" else 1e-4
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=tolerance)
    return ""


def main() -> None:
    library, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    refused = sum(bool(run(case, library)) for case in cases(count, seed))
    print(f"operator: {count:,} graphs, {refused:,} of them refused, the others computed right")


if __name__ == "__main__":
    main()
