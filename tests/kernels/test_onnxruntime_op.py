"""The operators gblm.BitmaskLinear and DenseLinear on graphs from anywhere: computed right, or refused in words."""

import ctypes
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import set_external_data

from gblm_compress.errors import MissingDependencyError
from gblm_compress.exporters.onnx_packing import use_kernels_
from gblm_compress.kernels import cpu
from tests.exporters.test_onnx_slim import parsed
from tests.hostile_graphs import Case, run, run_many, sound_case


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return str(cpu.onnxruntime_library())
    except MissingDependencyError:
        pytest.skip("installed without a C compiler")


def test_any_graph_is_computed_right_or_refused(library: str) -> None:
    """A wrong product, or a sound graph that is refused, is an AssertionError."""
    assert 0.5 < run_many(600, library) / 600 < 0.8  # both kinds are tried


def changed(name: str, array: np.ndarray):
    return lambda case: case.tensors.__setitem__(name, array)


def with_another_of_half_precision(case: Case) -> None:
    case.tensors["values1"] = case.tensors["values0"].astype(np.float16)
    case.inputs += ["mask0", "values1", "starts0"]
    case.outputs.append("y1")


DAMAGES = {
    "BitmaskLinear": [
        (with_another_of_half_precision, "the values of weight 0 and weight 1 are of different types"),
        (changed("mask0", np.full((2, 1), -1)), "starts 'starts0' says 1 at row 1; the rows before it have 64 bits"),
        (changed("mask0", np.zeros((2, 0), np.int64)), r"mask 'mask0' has shape \[2, 0\]; it needs at least one row"),
        (changed("starts0", np.array([0])), "starts 'starts0' has 1 elements; the mask has 2 rows"),
        (changed("values0", np.zeros(64, np.float32)), "values 'values0' has 64 elements; .* 2 bits, which takes 66"),
        (lambda case: case.variable.add("values0"), "values 'values0' must be a constant initializer"),
        (lambda case: case.inputs.extend(case.inputs[1:] * 8), "of 1 to 8 weights, .* it has 28 inputs and 1 outputs"),
        (changed("x", np.zeros((3, 65), np.float32)), "the last of 64; .* 2 dimensions, the last of 65"),
    ],
    "DenseLinear": [
        (changed("weight", np.zeros((2, 65), np.float16)), r"weight 'weight' has shape \[2, 65\]; it needs rows, and"),
        (changed("weight", np.zeros(64, np.float32)), "with 2 dimensions; it has element type 1 and 1"),
        (lambda case: case.variable.add("weight"), "DenseLinear: weight 'weight' must be a constant initializer"),
    ],
    "QuantisedLinear": [
        (changed("mask0", np.ones((2, 1025), np.int64)), r"mask 'mask0' has shape \[2, 1025\]; it .* 1 to 1024 words"),
        (changed("values0", np.zeros(67, np.uint8)), "values beside levels 'levels0' have 67 .*; the mask takes 66"),
        (changed("levels0", np.zeros(15, np.int8)), "levels 'levels0' have 15 elements; values of int8 need none"),
        (changed("scales0", np.zeros((2, 3), np.float16)), r"scales 'scales0' have shape \[2, 3\]; 2 rows of 64"),
        (changed("scales0", np.zeros((2, 1), np.float32)), "scales 'scales0' must be a tensor of float16 with 2 dim"),
        (lambda case: case.inputs.pop(), "mask, values, scales and levels of 1 to 8 weights, .* it has 4 inputs and 1"),
    ],
}
SOUND = {
    "BitmaskLinear": {
        "mask0": np.array([[1], [2]]),
        "values0": np.append([3.0, 4.0], np.zeros(64)).astype(np.float32),
        "starts0": np.array([0, 1]),
    },
    "DenseLinear": {"weight": np.ones((2, 64), np.float16)},
    "QuantisedLinear": {
        "mask0": np.array([[1], [6]]),
        "values0": np.ones(66, np.uint8),
        "scales0": np.ones((2, 1), np.float16),
        "levels0": np.arange(16, dtype=np.int8),
    },
}


@pytest.mark.parametrize(
    ("operator", "damage", "message"),
    [(operator, *damaged) for operator, found in DAMAGES.items() for damaged in found],
)
def test_the_message_names_the_fault(library: str, operator: str, damage, message: str) -> None:
    case = Case(operator, {"x": np.ones((3, 64), np.float32)} | SOUND[operator])
    assert run(case, library) == ""
    damage(case)
    assert re.search(message, run(case, library))


@pytest.mark.parametrize("path", [*cpu.PATHS, "none"])
def test_a_path_can_be_forced(library: str, monkeypatch, path: str) -> None:
    monkeypatch.setenv(cpu.PATH_VARIABLE, path)
    for seed in range(40):
        case = sound_case(random.Random(seed))
        half = any(tensor.dtype == np.float16 for tensor in case.tensors.values())
        dtype = torch.int8 if case.operator == "QuantisedLinear" else torch.float16 if half else torch.float32
        expected = "" if path in cpu.paths(dtype) else f"{path}: this CPU has no such path"
        assert re.search(expected or "^$", run(case, library))


@pytest.mark.parametrize(
    ("dtype", "path"), [(dtype, path) for dtype in (torch.float32, torch.float16) for path in cpu.paths(dtype)], ids=str
)
def test_dense_weights_and_many_tokens(library: str, monkeypatch, dtype: torch.dtype, path: str) -> None:
    """Rows and tokens that fill the tiles of the kernel, and that leave some of a tile."""
    monkeypatch.setenv(cpu.PATH_VARIABLE, path)
    numbers = np.random.default_rng(0)
    for rows, columns in ((1, 64), (7, 192), (130, 320)):
        weight = numbers.standard_normal((rows, columns)).astype(torch.empty(0, dtype=dtype).numpy().dtype)
        for tokens in (9, 17, 48, 60, 80, 90, 129):
            x = numbers.standard_normal((tokens, columns)).astype(np.float32)
            assert run(Case("DenseLinear", {"x": x, "weight": weight}), library) == ""


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_weights_beside_the_graph(library: str, tmp_path, offset: int) -> None:
    """ONNX Runtime maps their file, at whatever offset they have; what is written into it later moves no kernel."""
    case = sound_case(random.Random(4), ["BitmaskLinear"])
    model = onnx.load_from_string(case.model())
    content = b""
    for tensor in (tensor for tensor in model.graph.initializer if tensor.raw_data):
        content += bytes(-len(content) % 8 + offset)
        set_external_data(tensor, "data", len(content), len(tensor.raw_data))
        content += tensor.raw_data
        tensor.ClearField("raw_data")
    (tmp_path / "data").write_bytes(content)
    onnx.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    for y, expected in zip(session.run(None, case.feeds()), case.products(), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    with (tmp_path / "data").open("r+b") as file:
        file.write(b"\x01" * len(content))
    session.run(None, case.feeds())


def test_sessions_of_several_threads(library: str) -> None:
    pick = random.Random(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda case: run(case, library), [sound_case(pick) for _ in range(64)])) == {""}


def test_a_runtime_that_is_too_old_is_told_what_is_needed(library: str) -> None:
    """One that has the interface of version 16, of which CreateStatus is the first function, and no later one."""
    said: list[tuple[int, bytes]] = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda *new: said.append(new) or 1234)
    interface = ctypes.cast(create, ctypes.c_void_p)
    of_version = {version: ctypes.addressof(interface) for version in range(17)}
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(of_version.get)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value)  # GetApi and GetVersionString
    assert ctypes.CDLL(library).RegisterCustomOps(None, base) == 1234
    assert said == [(1, b"gblm: needs ONNX Runtime 1.17 or newer")]  # 1 is ORT_FAIL


def test_a_program_in_c(library: str, tmp_path) -> None:
    """It registers the library by its path, opens what an export writes, and gets numpy's product."""
    runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if shutil.which("cc") is None or runtime is None:
        pytest.skip("no C compiler, or an ONNX Runtime without libonnxruntime.so")
    (tmp_path / "libonnxruntime.so.1").symlink_to(runtime)
    command = ["cc", "-Wall", "-Wextra", "-Werror", f"-I{sys.prefix}/onnxruntime/usr/include"]
    command += [Path(__file__).with_name("one_product.c"), runtime, f"-Wl,-rpath,{tmp_path}"]
    command += ["-o", tmp_path / "one_product"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "onnxruntime_c_api.h: No such file" in done.stderr:
        pytest.skip("ONNX Runtime's C header is missing (libonnxruntime-dev)")
    assert done.returncode == 0, done.stderr
    generator = np.random.default_rng(0)
    weight = (generator.standard_normal((128, 40)) * (generator.random((128, 40)) < 0.5)).astype(np.float32)
    program = parsed("y = MatMul (x, weight)", {"weight": weight}, {"x": ["rows", 128]})
    use_kernels_(program, ["weight"])
    ir.save(program, tmp_path / "model.onnx", external_data="model.onnx.data")
    shutil.copy(library, tmp_path / "gblm_onnxruntime.so")
    done = subprocess.run([tmp_path / "one_product", tmp_path, "128", "40"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    expected = (np.arange(128) % 7 - 3) @ weight.astype(np.float64)
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], expected, rtol=1e-5, atol=1e-5)
