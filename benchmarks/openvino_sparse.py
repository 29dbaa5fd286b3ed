"""Products of int8 weights in OpenVINO, dense and packed by its CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, one thread.

    python benchmarks/openvino_sparse.py --shapes 4096x4096 --zeros 0.5 0.8 --tokens 1 64 --repeats 100

A table of milliseconds, the least of all repeats; dense and packed are timed in turn. OpenVINO packs where the CPU has
AMX, weights and activations are int8, rows and columns are multiples of 64 and at least RATE of the weights are zero;
elsewhere the two columns are the same. ONEDNN_VERBOSE=2 shows which: the weight is "sparse:packed".
"""

import argparse
import time
from typing import Any

import numpy as np

RATE = 0.4


def product(rows: int, columns: int, zeros: float) -> Any:
    """y = x Wᵀ with x of 8 bit and W [rows, columns] of 8 bit with a scale per row, as quantisation tools write it."""
    import openvino as ov
    import openvino.opset13 as ops

    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (rows, columns)).astype(np.float32)
    weight[generator.random((rows, columns)) < zeros] = 0
    scale = np.full((rows, 1), 127, np.float32)
    low, high = ops.constant(np.float32(-4)), ops.constant(np.float32(4 * 127 / 128))
    x = ops.parameter([-1, columns], np.float32)
    x8 = ops.fake_quantize(x, low, high, low, high, 256)
    w8 = ops.fake_quantize(ops.constant(weight), *[ops.constant(bound) for bound in (-scale, scale)] * 2, 255)
    return ov.Model([ops.result(ops.matmul(x8, w8, False, True))], [x])


def milliseconds(rows: int, columns: int, zeros: float, tokens: int, repeats: int) -> tuple[float, float]:
    """The time of a product with the dense weight, and with the packed one.

    Raises:
        AssertionError: they give different products.
    """
    import openvino as ov

    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
    requests = []
    for rate in (1.0, RATE):
        options = {"INFERENCE_NUM_THREADS": 1, "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate}
        requests.append(ov.Core().compile_model(product(rows, columns, zeros), "CPU", options).create_infer_request())
    dense, packed = (request.infer({0: x})[0].copy() for request in requests)
    np.testing.assert_allclose(packed, dense, rtol=1e-5, atol=1e-5)
    least = [float("inf")] * 2
    for _ in range(repeats):
        for i, request in enumerate(requests):
            start = time.perf_counter()
            request.infer()
            least[i] = min(least[i], 1e3 * (time.perf_counter() - start))
    return least[0], least[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "4096x4096", "16384x4096"], help="ROWSxCOLUMNS")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.5, 0.8], help="fractions of the weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--repeats", type=int, default=100)
    given = parser.parse_args()
    print("| rows × columns | zeros | tokens | dense, ms | packed, ms | |\n| --- | --- | --- | --- | --- | --- |")
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        for zeros in given.zeros:
            for tokens in given.tokens:
                dense, packed = milliseconds(rows, columns, zeros, tokens, given.repeats)
                times = f"{dense:.3f} | {packed:.3f} | {dense / packed:.2f}×"
                print(f"| {rows} × {columns} | {zeros:.0%} | {tokens} | {times} |", flush=True)


if __name__ == "__main__":
    main()
