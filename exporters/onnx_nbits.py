"""Weights in blocks of 8 or 4 bits for ONNX Runtime's own operator (com.microsoft MatMulNBits): no zeros are spared.

What people compare a packed model with. ONNX Runtime's quantizer rounds; a block is `group` columns of a row, with a
scale in float32. Inputs are rounded to 8 bits where that is the faster product (accuracy level 4). A head that shares
its weight with the embedding is stored once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from torch import Tensor

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.exporters.onnx_bitmask import initializer
from gblm_compress.exporters.onnx_rows import Rows, rows_of, store_embeddings_, use_rows_, widened
from gblm_compress.layouts.packed import MOVES_MUCH, share_moved

GROUP = 32
"""Columns of a block where nothing else is asked for: those of llama.cpp's Q8_0 and Q4_0 as well."""
BLOCKS, BLOCK_SCALES = {8: ".blocks8", 4: ".blocks4"}, ".block_scales"
INT8_INPUTS = 4  # an accuracy level


@dataclass(frozen=True)
class Blocks:
    """A weight [rows, columns] in blocks.

    Attributes:
        levels: unsigned, [rows, blocks, bytes of a block]; of 4 bits the first is the lower half of a byte.
        scales: [rows, blocks] in float32; a weight is scale · (level - half of all levels).
        bits: of a level.
        columns: of the weight; the last block may be longer.
    """

    levels: Any
    scales: Any
    bits: int
    columns: int

    @property
    def largest_error(self) -> float:
        """As of layouts of as many bits."""
        return MOVES_MUCH[self.bits]

    @classmethod
    def from_dense(cls, weight: Tensor, bits: int, group: int) -> Self:
        """The weight rounded by ONNX Runtime's quantizer, symmetrically: zeros stay zeros."""
        config = DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=True, bits=bits)
        turned = np.ascontiguousarray(weight.numpy().T)
        levels, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(turned)
        return cls(levels, scales.reshape(len(weight), -1), bits, weight.shape[1])

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """The rows of several weights, one below the other."""
        levels, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("levels", "scales"))
        return cls(levels, scales, parts[0].bits, parts[0].columns)

    def dense_weight(self) -> Tensor:
        """The weight [rows, columns] in float32."""
        return torch.from_numpy(restored(self.levels, self.scales, self.bits, self.columns))

    def error(self, weight: Tensor) -> float:
        """As of layouts."""
        return share_moved(self.dense_weight(), weight)


def restored(levels: Any, scales: Any, bits: int, columns: int) -> Any:
    """The weight [rows, columns] of the initializers of a MatMulNBits, in float32.

    Raises:
        VerificationError: they do not fit each other.
    """
    rows, blocks, size = levels.shape if levels.ndim == 3 else (0, 0, 0)
    if scales.shape != (rows, blocks) or not 0 <= blocks * size * 8 // bits - columns < size * 8 // bits:
        raise VerificationError(f"blocks of shape {list(levels.shape)} do not fit scales of shape {list(scales.shape)}")
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], axis=-1)
    centred = levels.reshape(rows, blocks, -1).astype(np.float32) - (1 << (bits - 1))
    return (centred * scales[:, :, None]).reshape(rows, -1)[:, :columns] + np.float32(0)  # no zero is -0.0


def use_nbits_(program: ir.Model, packed: Mapping[str, Blocks], tables: Sequence[Blocks]) -> None:
    """Multiply by blocks instead of float32 weights, in place.

    Args:
        packed: {initializer: its weight}, of all that are rounded.
        tables: the weights of head and embedding; they take the place of initializers with their numbers.

    Raises:
        ModelError: a weight is not used by a MatMul.
    """

    def store(name: str, weight: Any) -> Rows | None:
        known = packed.get(name)
        if known is None:
            known = next((table for table in tables if np.array_equal(table.dense_weight().numpy(), weight)), None)
        return None if known is None else _rows(program.graph, name, known)

    use_rows_(program, store)
    store_embeddings_(program, store)
    if left := sorted(packed.keys() & program.graph.initializers.keys()):
        users = {node.op_type for node, _ in program.graph.initializers[left[0]].uses()}
        raise ModelError(
            f"{left[0]}: MatMulNBits takes the place of a MatMul, and this weight is used by "
            f"{', '.join(sorted(users))}; export to bitmask-int8 or bitmask-int4"
        )
    program.opset_imports["com.microsoft"] = 1


def _rows(graph: ir.Graph, name: str, weight: Blocks) -> Rows:
    rows, blocks, size = weight.levels.shape
    levels = initializer(graph, name + BLOCKS[weight.bits], weight.levels)
    scales = initializer(graph, name + BLOCK_SCALES, weight.scales)
    sizes = {"K": weight.columns, "N": rows, "bits": weight.bits, "block_size": size * 8 // weight.bits}
    attributes = {**sizes, "accuracy_level": INT8_INPUTS}

    def multiply(x: ir.Value) -> ir.Node:
        return ir.node("MatMulNBits", [x, levels, scales], attributes=attributes, domain="com.microsoft")

    def read(gather: ir.Node) -> list[ir.Node]:
        constants = {
            suffix: graph.initializers.get(f"{name}.{suffix}") or initializer(graph, f"{name}.{suffix}", array)
            for suffix, array in (
                ("centre", np.array(1 << (weight.bits - 1), np.float32)),
                ("last", np.array([-1], np.int64)),
                ("flat", np.array([0, 0, blocks * size * 8 // weight.bits], np.int64)),
                ("first", np.array([0], np.int64)),
                ("columns", np.array([weight.columns], np.int64)),
            )
        }
        found, scale = rows_of(gather, levels), rows_of(gather, scales)
        wide = widened(found)
        centred = ir.node("Sub", [wide.outputs[0], constants["centre"]])
        each = ir.node("Unsqueeze", [scale.outputs[0], constants["last"]])
        scaled = ir.node("Mul", [centred.outputs[0], each.outputs[0]])
        flat = ir.node("Reshape", [scaled.outputs[0], constants["flat"]])
        own = ["first", "columns", "last"]  # of the last block of a row some columns may be beyond the weight
        cut = ir.node("Slice", [flat.outputs[0], *(constants[name] for name in own)])
        return [found, scale, wide, centred, each, scaled, flat, cut]

    return Rows(multiply, read)
