"""From the tensors of a folder to the packed layer of an engine that merges layers and shards them over processes."""

import math
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.layouts.packed_linear import PackedLinear

DENSE = "weight"  # of a part that was not pruned, beside others that were


class Parts:
    """What has been read of one layer of an engine.

    A part is one layer of the folder. Its share of this process is cut out as soon as its tensors are there, and packed
    all along: a file that is mapped into memory is not held, and no dense weight is made.

    Args:
        kind: the layout's layers.
        rows: of the engine's layer in this process: outputs of all parts.
        columns: inputs of the layer in this process, of `inputs` that it has in all.
        place: takes the number of rows that a part has in the folder, and its name among the parts; returns for each
            row of the engine's layer which row of the part it holds, or -1.
    """

    def __init__(
        self,
        kind: type[PackedLinear],
        rows: int,
        columns: range,
        inputs: int,
        place: Callable[[int, Hashable], Tensor],
        group: int | None = None,
    ) -> None:
        self._packing = {} if group is None else {"group": group}
        self.kind, self.rows, self.columns, self.inputs, self._place = kind, rows, columns, inputs, place
        self._read: dict[Hashable, dict[str, Tensor]] = {}
        self._shares: dict[int, PackedLinear] = {}

    def take(self, tensor_name: str, tensor: Tensor, part: Hashable = None) -> None:
        """Take one tensor of a part.

        Raises:
            ModelError: the part is damaged, or is no part of that layer.
            UsageError: the layout cannot be cut as the process needs it, or cannot hold a dense part.
        """
        read = self._read.setdefault(part, {})
        read[tensor_name] = tensor
        if DENSE in read or all(name in read for name in self.kind.PACKED):
            layer = self._layer(self._read.pop(part))
            for first, rows in _runs(self._place(layer.out_features, part)):
                self._shares[first] = layer.cut(rows, self.columns)

    def _layer(self, read: dict[str, Tensor]) -> PackedLinear:
        if DENSE in read:
            layer = self.kind.from_dense(read[DENSE], None, **self._packing)
            most = self.kind.LARGEST_ERROR
            if most < math.inf and (error := layer.error(read[DENSE])) > most:
                raise ModelError(
                    f"a layer beside packed ones was left dense, and the {self.kind.LAYOUT} layout would change it by "
                    f"{100 * error:.0f} %; export to bitmask, or prune all layers that the engine merges"
                )
        else:
            tensors = [read[name] for name in self.kind.PACKED]
            layer = self.kind.holding(((*tensors[0].shape, 0)[0], self.inputs), *tensors)
            layer.check()
        if layer.in_features != self.inputs:
            raise ModelError(f"{DENSE}: {layer.in_features} columns; the model's has {self.inputs}")
        return layer

    def whole(self, device: torch.device, dtype: torch.dtype) -> PackedLinear:
        """The layer of this process, ready to run there.

        Raises:
            ModelError: a tensor was not in the folder, or a weight does not fit into the dtype.
            UsageError: the layout cannot be stacked.
        """
        if sum(share.out_features for share in self._shares.values()) != self.rows:
            raise ModelError("a tensor of it is not in the folder, so it is incomplete")
        shares = [self._shares.pop(first) for first in sorted(self._shares)]
        layer = shares[0] if len(shares) == 1 else self.kind.stack(shares)
        layer = layer.to(device=device, dtype=dtype)
        layer.prepare()
        return layer


def _runs(places: Tensor) -> Iterator[tuple[int, range]]:
    """Where rows of a part lie without gaps: (first row in the engine's layer, rows of the part)."""
    held = (places >= 0).nonzero().flatten().tolist()
    pairs = [(row, int(places[row])) for row in held]
    while pairs:
        row, source = pairs[0]
        length = next((i for i, pair in enumerate(pairs) if pair != (row + i, source + i)), len(pairs))
        yield row, range(source, source + length)
        pairs = pairs[length:]
