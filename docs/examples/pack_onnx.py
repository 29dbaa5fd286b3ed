"""Packs the zeros of an ONNX graph that another tool pruned, and times it beside the original.

    python docs/examples/pack_onnx.py model.onnx packed.onnx

A float32 weight [in_features, out_features] of MatMul is packed if at most 75 % of it is nonzero and in_features is a
multiple of 64. Both graphs must agree on random inputs before PACKED appears. To run it in a program of yours, register
`gblm_compress.onnxruntime_library()` in its session options. For a folder of transformers take `gblm-compress export`.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime
from google.protobuf.message import DecodeError

import gblm_compress
from gblm_compress.exporters.onnx_packing import use_kernels_
from gblm_compress.formats import MOST_NONZEROS
from gblm_compress.kernels.masks import WORD

BATCH, LENGTH, CALLS = 1, 128, 20  # sizes of dimensions that the graph leaves open; timed calls


def share_of_nonzeros(value: ir.Value) -> float:
    """The share of an initializer's nonzeros; 1 if it cannot be packed."""
    weight, uses = value.const_value, {(node.op_type, place) for node, place in value.uses()}
    if weight is None or uses != {("MatMul", 1)} or weight.dtype != ir.DataType.FLOAT or len(weight.shape) != 2:
        return 1.0
    return float((weight.numpy() != 0).mean()) if weight.shape[0] % WORD == 0 else 1.0


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(gblm_compress.onnxruntime_library()))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def random_input(about: onnxruntime.NodeArg, draws: np.random.Generator) -> np.ndarray:
    """Zeros and ones for integers, as they are tokens, masks and types alike."""
    open_sizes = [BATCH] + [LENGTH] * len(about.shape)
    shape = [size if isinstance(size, int) else open_sizes[place] for place, size in enumerate(about.shape)]
    if about.type == "tensor(float)":
        return draws.standard_normal(shape, np.float32)
    return draws.integers(0, 2, shape).astype({"tensor(int32)": np.int32}.get(about.type, np.int64))


def main(original: Path, output: Path) -> None:
    try:
        program = ir.load(original)
    except DecodeError as error:
        sys.exit(f"{original} is no ONNX file, or is damaged ({error})")
    shares = {name: share_of_nonzeros(value) for name, value in program.graph.initializers.items()}
    sparse = [name for name, share in shares.items() if share <= MOST_NONZEROS]
    if not sparse:
        sys.exit(f"nothing to pack: in {original} no weight of a MatMul has {MOST_NONZEROS:.0%} nonzeros or fewer")
    for name in sparse:
        print(f"{name}: {shares[name]:.1%} nonzero")
    use_kernels_(program, sparse)
    with TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        ir.save(program, made, external_data=f"{output.name}.data")
        sessions, draws = {"dense": session(original), "packed": session(made)}, np.random.default_rng(0)
        inputs = {about.name: random_input(about, draws) for about in sessions["dense"].get_inputs()}
        dense, packed = (one.run(None, inputs) for one in sessions.values())
        for expected, got in zip(dense, packed, strict=True):
            if not np.allclose(got, expected, rtol=0, atol=1e-4 * max(1.0, float(np.abs(expected).max()))):
                sys.exit(f"the packed graph of {original} computes something else; nothing is written")
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(CALLS):
            for name, one in sessions.items():
                start = time.perf_counter()
                one.run(None, inputs)
                times[name].append(1000 * (time.perf_counter() - start))
        for name, measured in times.items():
            print(f"{name}: {median(measured):.1f} ms a call")
        for file in (made, made.with_name(f"{output.name}.data")):
            file.replace(output.with_name(file.name))
    print(f"packed {len(sparse)} weights; written to {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("packed", type=Path)
    given = parser.parse_args()
    if not given.original.is_file():
        parser.error(f"no such file: {given.original}")
    if given.packed.exists() or not given.packed.parent.is_dir():
        parser.error(f"{given.packed} exists, or its folder does not; give another name")
    main(given.original, given.packed)
