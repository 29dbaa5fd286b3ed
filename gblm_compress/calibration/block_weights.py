"""Where the weights of a model are while its blocks are worked on one by one: all in memory, or the block at work only.

Both classes offer the same: `with weights.block(i):` and `with weights.outer():` make the weights of one block, or of
everything outside the blocks, ready for use.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError
from gblm_compress.models.architecture import find_blocks
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.source import ModelSource


class ResidentWeights:
    """A model that is in memory as a whole.

    Attributes:
        model: the model.
        blocks: its blocks in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix, self.blocks = find_blocks(model)

    def per_block(self, layers: list[dict[str, nn.Module]]) -> list[dict[str, nn.Module]]:
        """The layers of `prunable_layers`, by these blocks."""
        return layers

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block, with its weights."""
        yield self.blocks[index]

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Embeddings, final norm and head."""
        yield


class StreamedWeights:
    """A model of which only what is at work is in memory; the rest stays in the safetensors of its checkpoint.

    What is done to a block's weights is lost when its `with` ends, unless somebody has saved it. Where blocks run on a
    GPU the next one is read while one runs; on a CPU the pages of the file are used as they are where the dtype allows.

    Attributes:
        model: the model; parameters that are not at work are on the meta device.
        blocks: its blocks in order.

    Args:
        source: the dense model.
        model: it without its weights, as `loading.load_skeleton` makes it; buffers must be real.
        device: where blocks run.

    Raises:
        ModelError: the checkpoint lacks a tensor.
    """

    def __init__(self, source: ModelSource, model: Any, device: str) -> None:
        self.model = model
        self.prefix, self.blocks = find_blocks(self.model)
        self._device = torch.device(device)
        self._checkpoint = Checkpoint(source.folder, self.model)
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1)
        self._latest = 0
        groups = _tied_parameters(self.model)
        shared = [name for group in groups for name in group if len({self._block_of(one) for one in group}) > 1]
        if any(self._block_of(name) for name in shared):
            raise ModelError(
                f"model {source.name!r}: {shared[0]!r} is shared between blocks, which cannot be pruned one at a "
                "time in memory; give more --memory"
            )
        self._blocks = [
            [group for group in groups if group[0].startswith(f"{self.prefix}.{index}.")]
            for index in range(len(self.blocks))
        ]
        self._outer = [group for group in groups if not group[0].startswith(f"{self.prefix}.")]
        for group in groups:
            if not any(name in self._checkpoint for name in group):
                raise ModelError(
                    f"model {source.name!r}: its files have no tensor {group[0]!r}; the checkpoint is incomplete, or "
                    "of another architecture than config.json says"
                )
        for name, buffer in self.model.named_buffers():
            if name in self._checkpoint:
                buffer.copy_(self._checkpoint.read(name))
        _buffers_to(self.model, self._device)

    def per_block(self, layers: list[dict[str, nn.Module]]) -> list[dict[str, nn.Module]]:
        """The layers of `prunable_layers`, by these blocks."""
        return layers

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block, with its weights."""
        ahead, self._ahead = self._ahead, None
        tensors = ahead[1].result() if ahead and ahead[0] == index else self._read(self._blocks[index])
        following = index + (1 if index >= self._latest else -1)
        self._latest = index
        if self._reads_ahead and 0 <= following < len(self.blocks):
            self._ahead = (following, self._reader.submit(self._read, self._blocks[following]))
        with self._placed(self._blocks[index], tensors):
            yield self.blocks[index]

    def _block_of(self, name: str) -> str:
        """The number of the block that a tensor is in; empty for one outside the blocks."""
        return name.removeprefix(f"{self.prefix}.").partition(".")[0] if name.startswith(f"{self.prefix}.") else ""

    @property
    def _reads_ahead(self) -> bool:
        """Whether there is a device that computes while the next block is read."""
        return self._device.type == "cuda"

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Embeddings, final norm and head."""
        with self._placed(self._outer, self._read(self._outer)):
            yield

    def _read(self, groups: list[list[str]]) -> dict[str, Tensor]:
        tensors = {}
        for group in groups:
            name = next(name for name in group if name in self._checkpoint)
            stored, wanted = self._checkpoint.read(name), self.model.get_parameter(group[0])
            if stored.shape != wanted.shape:
                raise ModelError(
                    f"{name} has the shape {list(stored.shape)} in the checkpoint; the architecture of config.json "
                    f"needs {list(wanted.shape)}: the folder is damaged or of another model"
                )
            tensors[group[0]] = stored.to(self._device, wanted.dtype)
        return tensors

    @contextmanager
    def _placed(self, groups: list[list[str]], tensors: dict[str, Tensor]) -> Iterator[None]:
        absent = {}
        for group in groups:
            parameter = nn.Parameter(tensors.pop(group[0]), requires_grad=False)
            for name in group:
                absent[name] = self._replace(name, parameter)
        try:
            yield
        finally:
            for name, parameter in absent.items():
                self._replace(name, parameter)

    def _replace(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        path, _, leaf = name.rpartition(".")
        parameters = self.model.get_submodule(path)._parameters
        before, parameters[leaf] = parameters[leaf], parameter
        return before


Weights = ResidentWeights | StreamedWeights


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """The names of all parameters; those that share one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
