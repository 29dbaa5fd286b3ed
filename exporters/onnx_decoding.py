"""Weights as the initializers of an exported graph hold them, in whichever form."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.exporters.onnx_bitmask import MASK, ROWS, STARTS, VALUES
from gblm_compress.exporters.onnx_kernels import LEVELS, SCALES
from gblm_compress.exporters.onnx_nbits import BLOCK_SCALES, BLOCKS, restored
from gblm_compress.kernels.masks import WORD, row_starts
from gblm_compress.layouts.packed_linear import PackedLinear

DTYPES = ("float32", "float16")
QUANTISED = {MASK: ("int64",), VALUES: ("int8", "uint8"), SCALES: ("float16",), LEVELS: ("int8",)}


def decode(initializers: Any, name: str, shape: tuple[int, ...]) -> Any:
    """The weight [in_features, out_features], or the other way round, as its initializers store it.

    Args:
        shape: of the initializer before it was packed.

    Raises:
        VerificationError: an initializer is missing or does not fit the others or the shape.
    """

    def stored(suffix: str, *dtypes: str) -> Any:
        value = initializers.get(name + suffix)
        if value is None or value.const_value is None or value.const_value.numpy().dtype not in dtypes:
            raise VerificationError(f"{name + suffix}: the graph has no such initializer of {' or '.join(dtypes)}")
        return value.const_value.numpy()

    def checked(array: Any) -> Any:
        if array.shape != shape:
            raise VerificationError(f"{name}.shape: {list(array.shape)}; the weight has {list(shape)}")
        return array

    if name in initializers:
        return checked(stored("", *DTYPES))
    if name + ROWS in initializers:
        return checked(stored(ROWS, *DTYPES).T)
    if name + SCALES in initializers:
        return checked(_dequantised(name, *(stored(part, *dtypes) for part, dtypes in QUANTISED.items())).numpy().T)
    for bits, suffix in BLOCKS.items():
        if name + suffix in initializers:
            levels, scales = stored(suffix, "uint8"), stored(BLOCK_SCALES, "float32")
            return checked(restored(levels, scales, bits, shape[0]).T)
    values = stored(VALUES, *DTYPES)
    if name + STARTS in initializers:
        mask, starts = torch.tensor(stored(MASK, "int64")), torch.tensor(stored(STARTS, "int64"))
        weight = _unpacked(name, "bitmask", mask, {"mask": mask, "values": torch.tensor(values)})
        if not torch.equal(starts, row_starts(mask)):
            raise VerificationError(f"{name + STARTS}: does not say where the rows of the mask begin")
        return checked(weight.numpy().T)
    alive = np.unpackbits(stored(MASK, "uint8").reshape(-1), bitorder="little").astype(bool)
    if values.shape != (1 + alive.sum(),) or values[0] != 0:
        raise VerificationError(
            f"{name + VALUES}: shape {list(values.shape)}; the mask has {alive.sum()} bits, which takes one more"
        )
    dense = np.zeros(alive.shape, values.dtype)
    dense[alive] = values[1:]
    if dense.size != math.prod(shape):
        raise VerificationError(f"{name + MASK}: {dense.size} bits; the weight has {list(shape)} elements")
    return dense.reshape(shape)


def _dequantised(name: str, mask: Any, values: Any, scales: Any, levels: Any) -> Tensor:
    """The weight [rows, columns] of the inputs of gblm.QuantisedLinear."""
    parts = {"scales": torch.tensor(scales.view("int16")), "mask": torch.tensor(mask), "values": torch.tensor(values)}
    if not levels.size:
        return _unpacked(name, "bitmask-int8", parts["mask"], parts)
    return _unpacked(name, "bitmask-int4", parts["mask"], {**parts, "levels": torch.tensor(levels).reshape(-1, 16)})


def _unpacked(name: str, layout: str, mask: Tensor, parts: dict[str, Tensor]) -> Tensor:
    try:
        layer = PackedLinear.holding(layout, (len(mask), mask.shape[-1] * WORD), parts)
        layer.check()
    except ModelError as error:
        raise VerificationError(f"{name}.{error}") from error
    return layer.dense_weight()
