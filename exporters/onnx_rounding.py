"""Weights as levels of 8 or 4 bits in ONNX graphs: for this package's operators, or for ONNX Runtime's.

`Blocks` are for ONNX Runtime's MatMulNBits, `Channels` for its DynamicQuantizeMatMul. Both store zeros, too.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor, nn

from gblm_compress.calibration.weights import show_, tie_of
from gblm_compress.errors import ModelError
from gblm_compress.exporters import zeros_of_rounding
from gblm_compress.exporters.onnx_weights import Rows, constant, initializer, rows_of, use_rows_, widened
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import MOVES_MUCH, by_rows, share_moved
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.quantisation import Grid, check_scales, nearest, scales_of
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models import loading
from gblm_compress.models.architecture import weight_matrix
from gblm_compress.models.grids import read_grids
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import ExportSettings

GROUP = 32  # Default columns of a block, as in llama.cpp's Q8_0 and Q4_0.
BLOCKS, BLOCK_SCALES = {8: ".blocks8", 4: ".blocks4"}, ".block_scales"
CHANNELS, CHANNEL_SCALES = ".channels", ".channel_scales"
INT8_INPUTS = 4  # Accuracy level: inputs are rounded to 8 bits, if that is faster.


class Rounded(NamedTuple):
    """Packed layers by name, their nonzeros, packed head and embedding, and entries of the checks."""

    layers: dict[str, Any]
    nonzeros: dict[str, int]
    tables: list[Any]
    checks: dict[str, Any]


@torch.no_grad()
def round_(
    model: Any, layers: Iterable[tuple[str, Any]], pack: Callable[[str, Tensor, bool], Any], sizes: Mapping[str, int]
) -> Rounded:
    """Round layers, (name, module) each, head and embedding, in place.

    `sizes` are the numbers of weights of the pruned layers.
    """
    packed, moved, before, after = {}, {}, {}, {}
    for name, layer in layers:
        weight = weight_matrix(layer).float()
        packed[name] = pack(name, weight, False)
        rounded = packed[name].dense_weight()
        moved[name] = share_moved(rounded, weight)
        before[name], after[name] = count_nonzeros(weight), count_nonzeros(rounded)
        show_(layer, packed[name])
    tables: dict[Any, Any] = {}  # one if head and embedding are tied
    for name, module in (("head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
        if isinstance(module, nn.Embedding | nn.Linear) and tie_of(module) not in tables:  # images have neither
            tables[tie_of(module)] = table = pack(name, module.weight.float(), True)
            show_(module, table)
    much = [name for name, share in moved.items() if share > packed[name].largest_error]
    checks = {"largest_rounding_error": max(moved.values()), **({"layers_rounded_much": much} if much else {})}
    return Rounded(packed, after, list(tables.values()), checks | zeros_of_rounding(before, after, sizes))


def packer(source: ModelSource, settings: ExportSettings, *, is_dense: bool) -> Callable[[str, Tensor, bool], Any]:
    """A function that packs a weight [out_features, in_features]; ModelError if float16 cannot hold the scales."""
    grids = read_grids(source)
    if not settings.kernels:
        bits, group = 8 if settings.quantise == "int8" else 4, settings.group or GROUP
        channels = by_channels(source, settings)

        def pack(name: str, weight: Tensor, is_table: bool) -> Any:
            grid = grids.get(name)
            if channels and not is_table:
                return Channels.from_dense(weight) if grid is None or grid.group else Channels.on_grid(weight, grid)
            if grid is None or len(grid.levels) > 1 << bits:
                return Blocks.from_dense(weight, 8 if is_table else bits, group)
            return Blocks.on_grid(weight, grid, bits)

        return pack
    of_layers = "int8" if is_dense and settings.quantise == "int8" else f"bitmask-{settings.quantise}"

    def pack_on_grid(name: str, weight: Tensor, is_table: bool) -> Any:
        layout, group = (LAYOUTS[of_layers].tables or "", None) if is_table else (of_layers, settings.group)
        kind: Any = LAYOUTS[layout].kind
        group, grid = group or kind.group, grids.get(name)
        grid = grid if kind.holds(grid) else None
        scales = grid.scales.float() if grid else by_rows(lambda rows: scales_of(rows, group), weight)
        check_scales(name, scales, "export without --kernels or without --quantise")
        return PackedLinear.from_dense(layout, weight, grid=grid, group=group)

    return pack_on_grid


def by_channels(source: ModelSource, settings: ExportSettings) -> bool:
    """Whether layers become `Channels`: for the many tokens of a forward pass they are twice as fast as `Blocks`."""
    return settings.quantise == "int8" and not settings.kernels and not loading.task_of(source).generates


@dataclass(frozen=True)
class Blocks:
    """A weight [rows, columns] in blocks, with the interface of packed layers: scale · (level - 2^(bits - 1)).

    Attributes:
        levels: unsigned [rows, blocks, bytes of a block]; with 4 bits the first is the lower half of a byte.
        scales: float32 [rows, blocks].
        columns: of the weight; the last block may be longer.
    """

    levels: Any
    scales: Any
    bits: int
    columns: int

    @property
    def largest_error(self) -> float:
        return MOVES_MUCH[self.bits]

    @classmethod
    def from_dense(cls, weight: Tensor, bits: int, group: int) -> Self:
        """The weight rounded by ONNX Runtime's quantizer, symmetrically: zeros stay zeros."""
        handler = logging.NullHandler()  # with a handler there, the import does not configure the root logger
        logging.root.addHandler(handler)
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        logging.root.removeHandler(handler)
        config = nbits.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=True, bits=bits)
        turned = np.ascontiguousarray(weight.numpy().T)
        levels, scales, _ = nbits.DefaultWeightOnlyQuantizer(config).qbits_block_quant(turned)
        return cls(levels, scales.reshape(len(weight), -1), bits, weight.shape[1])

    @classmethod
    def on_grid(cls, weight: Tensor, grid: Grid, bits: int) -> Self:
        """A weight on a grid of even levels, which it keeps."""
        group, (rows, columns) = grid.group or GROUP, weight.shape
        levels = nn.functional.pad(grid.levels[nearest(weight, grid).int()].short(), (0, -columns % group))
        codes = (levels + (1 << (bits - 1))).to(torch.uint8).view(rows, -1, group)
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return cls(codes.numpy(), grid.scales.float().expand(rows, codes.shape[1]).numpy(), bits, columns)

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        levels, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("levels", "scales"))
        return cls(levels, scales, parts[0].bits, parts[0].columns)

    def dense_weight(self) -> Tensor:
        """[rows, columns] in float32, without -0.0."""
        levels, (rows, blocks) = self.levels, self.scales.shape
        if self.bits == 4:
            levels = np.stack([levels & 15, levels >> 4], axis=-1)
        centred = levels.reshape(rows, blocks, -1).astype(np.float32) - (1 << (self.bits - 1))
        weight = (centred * self.scales[:, :, None]).reshape(rows, -1)[:, : self.columns]
        return torch.from_numpy(weight + np.float32(0))

    def rows(self, graph: ir.Graph, name: str) -> Rows:
        rows, blocks, size = self.levels.shape
        levels = initializer(graph, name + BLOCKS[self.bits], self.levels)
        scales = initializer(graph, name + BLOCK_SCALES, self.scales)
        sizes = {"K": self.columns, "N": rows, "bits": self.bits, "block_size": size * 8 // self.bits}
        attributes = {**sizes, "accuracy_level": INT8_INPUTS}

        def multiply(x: ir.Value) -> ir.Node:
            return ir.node("MatMulNBits", [x, levels, scales], attributes=attributes, domain="com.microsoft")

        def read(tape: Tape, gather: ir.Node) -> ir.Value:
            def stored(suffix: str, number: Any) -> ir.Value:
                return constant(graph, f"{name}.{suffix}", np.array(number))

            found, scale = rows_of(tape, gather, levels), rows_of(tape, gather, scales)
            centre = stored("centre", np.float32(1 << (self.bits - 1)))
            centred, last = tape.op("Sub", [widened(tape, found), centre]), stored("last", [-1])
            scaled = tape.op("Mul", [centred, tape.op("Unsqueeze", [scale, last])])
            flat = tape.op("Reshape", [scaled, stored("flat", [0, 0, blocks * size * 8 // self.bits])])
            # without the padding of the last block
            return tape.op("Slice", [flat, stored("first", [0]), stored("columns", [self.columns]), last])

        return Rows(multiply, read)


@dataclass(frozen=True)
class Channels:
    """A weight [rows, columns] in 8 bits with a scale for each row; inputs are rounded to 8 bits as well.

    Attributes:
        levels: int8 [columns, rows], from -127 to 127.
        scales: float32 [rows].
    """

    levels: Any
    scales: Any

    largest_error = MOVES_MUCH[8]

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        scales = weight.abs().amax(1).div(127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((weight / scales[:, None]).round().to(torch.int8).numpy().T, scales.numpy())

    @classmethod
    def on_grid(cls, weight: Tensor, grid: Grid) -> Self:
        """A weight on a grid with a scale for each row, which it keeps."""
        return cls(grid.levels[nearest(weight, grid).int()].numpy().T, grid.scales.float()[:, 0].numpy())

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        return cls(*(np.concatenate([getattr(part, name) for part in parts], -1) for name in ("levels", "scales")))

    def dense_weight(self) -> Tensor:
        return torch.from_numpy((self.levels * self.scales + np.float32(0)).T)

    def rows(self, graph: ir.Graph, name: str) -> Rows:
        levels = initializer(graph, name + CHANNELS, np.ascontiguousarray(self.levels))
        scales = initializer(graph, name + CHANNEL_SCALES, self.scales)

        def multiply(x: ir.Value) -> ir.Node:
            return ir.node("DynamicQuantizeMatMul", [x, levels, scales], domain="com.microsoft")

        def read(tape: Tape, gather: ir.Node) -> ir.Value:
            raise ModelError(f"{name}: the weight of a layer is an embedding too; add --kernels")

        return Rows(multiply, read)


def use_nbits_(program: ir.Model, packed: Mapping[str, Blocks | Channels], tables: Sequence[Blocks]) -> None:
    """Multiply by levels instead of float32 weights, in place, with ONNX Runtime's own operators.

    Args:
        packed: {initializer: its weight} of all layers.
        tables: head and embedding, which replace initializers of the same numbers.
    """

    def store(name: str, dense: Callable[[], Any]) -> Rows | None:
        known = packed.get(name)
        if known is None:
            weight = dense()
            known = next((table for table in tables if np.array_equal(table.dense_weight().numpy(), weight)), None)
        return None if known is None else known.rows(program.graph, name)

    use_rows_(program, store, embeddings=True)
    if left := sorted(packed.keys() & program.graph.initializers.keys()):
        users = {node.op_type for node, _ in program.graph.initializers[left[0]].uses()}
        raise ModelError(
            f"{left[0]}: levels can replace only the weight of a MatMul, and this weight is used by "
            f"{', '.join(sorted(users))}; export to bitmask-int8 or bitmask-int4"
        )
    program.opset_imports["com.microsoft"] = 1
