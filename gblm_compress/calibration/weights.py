"""Weights and hidden states of a model whose blocks are worked on one by one: in memory, or in files.

`with weights.block(i):` makes one block ready for use, `with weights.outer():` everything outside the blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.methods.zeros import count_nonzeros, is_finite
from gblm_compress.models import grids, loading, manifest
from gblm_compress.models.architecture import as_matrix, find_blocks, is_linear
from gblm_compress.models.checkpoint import Checkpoint, check_shape, read_tensor
from gblm_compress.models.source import ModelSource


class ResidentWeights:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix, self.blocks = find_blocks(model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        yield self.blocks[index]

    @contextmanager
    def outer(self) -> Iterator[None]:
        yield


class Shown(nn.Module):
    """A parametrization: a weight that takes memory only while it is used. `dense` makes it."""

    def __init__(self, dense: Callable[[], Tensor]) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, _: Tensor) -> Tensor:
        return self.dense()


def tie_of(module: Any) -> Any:
    """Equal for modules that share their weight."""
    return module.parametrizations.weight[0] if parametrize.is_parametrized(module) else module.weight.data_ptr()


def show_(module: Any, packed: Any) -> None:
    """Let a layer or an embedding, and those tied to it, compute with `packed.dense_weight()` [rows, columns]."""
    if parametrize.is_parametrized(module):
        module.parametrizations.weight[0].dense = lambda: as_matrix(module, packed.dense_weight())
    else:
        module.weight.copy_(as_matrix(module, packed.dense_weight()))


class StreamedWeights:
    """A model on disk, from `loading.load_skeleton`; only the block at work is in memory.

    Changes to a block's weights are lost when its `with` ends. On a CPU the pages of the file are used as they are if
    the dtype allows.
    """

    def __init__(self, source: ModelSource, model: Any, device: str) -> None:
        self.model = model
        self.prefix, self.blocks = find_blocks(self.model)
        self._device = torch.device(device)
        self._checkpoint = Checkpoint(source.folder, self.model)
        self._finite = set[str]()  # parameters that were read and checked
        groups = _tied_parameters(self.model)
        shared = [name for group in groups for name in group if len({self._block_of(one) for one in group}) > 1]
        if any(self._block_of(name) for name in shared):
            raise ModelError(
                f"model {source.name!r}: {shared[0]!r} is shared between blocks, which cannot be pruned one at a "
                "time in memory; give more --memory"
            )
        self._groups: defaultdict[str, list[list[str]]] = defaultdict(list)  # by their block
        for group in groups:
            self._groups[self._block_of(group[0])].append(group)
            if not any(name in self._checkpoint for name in group):
                raise ModelError(
                    f"model {source.name!r}: its files have no tensor {group[0]!r}; the checkpoint is incomplete, or "
                    "of another architecture than config.json says"
                )
        for name, buffer in self.model.named_buffers():
            if name in self._checkpoint:
                buffer.copy_(self._checkpoint.read(name))
        for module in self.model.modules():
            buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
            module._buffers.update({name: buffer.to(self._device) for name, buffer in buffers.items()})

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        with self._placed(str(index)):
            yield self.blocks[index]

    def _block_of(self, name: str) -> str:
        """The number of the block that a tensor is in; empty for one outside the blocks."""
        return name.removeprefix(f"{self.prefix}.").partition(".")[0] if name.startswith(f"{self.prefix}.") else ""

    @contextmanager
    def outer(self) -> Iterator[None]:
        with self._placed(""):
            yield

    @contextmanager
    def _placed(self, block: str) -> Iterator[None]:
        absent = {}
        try:
            for group in self._groups[block]:
                parameter = nn.Parameter(self._read(group, self.model.get_parameter(group[0])), requires_grad=False)
                for name in group:
                    absent[name] = self._replace(name, parameter)
            yield
        finally:
            for name, before in absent.items():
                self._replace(name, before)
            self._checkpoint.forget()

    def _read(self, group: list[str], wanted: Tensor) -> Tensor:
        name = next(name for name in group if name in self._checkpoint)
        stored = self._checkpoint.read(name)
        check_shape(name, list(stored.shape), wanted)
        read = stored.to(self._device, wanted.dtype)
        if group[0] not in self._finite and not is_finite(read):
            raise self._checkpoint.not_finite(name, read.dtype)
        self._finite.add(group[0])
        return read

    def attach_(self, rounded_to: torch.dtype) -> None:
        """Give the model all parameters, as `rounded_to` holds them, without -0.0. Matrices stay in their files."""
        for group in (group for groups in self._groups.values() for group in groups):
            modules, wanted = [self._owner(name) for name in group], self.model.get_parameter(group[0])

            def read(group: list[str] = group, wanted: Tensor = wanted) -> Tensor:
                return self._read(group, wanted).to(rounded_to).to(wanted.dtype) + 0.0

            self._read(group, wanted)  # so that faults of the files are found before any work
            if all(is_linear(module) or isinstance(module, nn.Embedding) for module in modules) and wanted.dim() == 2:
                weight = Shown(read)
                for module in modules:
                    module.weight = nn.Parameter(torch.empty(0, dtype=wanted.dtype), requires_grad=False)
                    parametrize.register_parametrization(module, "weight", weight, unsafe=True)
            else:
                for name in group:
                    self._replace(name, nn.Parameter(read(), requires_grad=False))

    def _owner(self, name: str) -> Any:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _replace(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        parameters, leaf = self._owner(name)._parameters, name.rpartition(".")[2]
        before, parameters[leaf] = parameters[leaf], parameter
        return before


Weights = ResidentWeights | StreamedWeights


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """The names of all parameters, grouped by the tensor that they share."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


@dataclass
class StatePool:
    """Room for all hidden states of a run, and for what is put away for a while."""

    folder: Path  # empty at the start, for what `left` does not hold
    left: int  # bytes of host memory
    device: torch.device
    numbers: Iterator[int] = field(default_factory=count)  # of files

    @contextmanager
    def put_away(self, tensors: Sequence[Tensor]) -> Iterator[Callable[[int], Tensor]]:
        """Hold tensors in host memory or in a file. The function gives one of them back, on the device."""
        size = sum(tensor.nbytes for tensor in tensors)
        if size <= self.left:
            held = [tensor.cpu() for tensor in tensors]
            self.left -= size
            try:
                yield lambda index: held[index].to(self.device)
            finally:
                self.left += size
            return
        path = self.new_file()
        save_file({str(index): tensor.cpu().contiguous() for index, tensor in enumerate(tensors)}, path)
        try:
            yield lambda index: read_tensor(path, str(index)).to(self.device)
        finally:
            path.unlink()

    def new_file(self) -> Path:
        return self.folder / f"{next(self.numbers)}.safetensors"


class HiddenStates(Sequence[Tensor]):
    """The hidden states [1, length, hidden size] of every sample at one place, read to the device.

    They lie in one piece of memory, or in a file each: many pieces would fragment the allocator's memory.
    """

    def __init__(self, pool: StatePool, samples: int) -> None:
        self._pool, self._samples = pool, samples
        self._memory: Tensor | None = None
        self._files: dict[int, Path] = {}

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if self._memory is not None:
            return self._memory[index : index + 1].to(self._pool.device, non_blocking=True)
        return load_file(self._files[index])["states"].to(self._pool.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: int, states: Tensor) -> None:
        states = states.detach()
        if self._memory is None and not self._files and len(self) * states.nbytes <= self._pool.left:
            shape, on_gpu = (len(self), *states.shape[1:]), states.device.type == "cuda"
            self._memory = torch.empty(shape, dtype=states.dtype, pin_memory=on_gpu)  # page-locked for the GPU
            self._pool.left -= self._memory.nbytes
        if self._memory is not None:
            self._memory[index : index + 1].copy_(states)
            return
        before, path = self._files.get(index), self._pool.new_file()
        save_file({"states": states.cpu().contiguous()}, path)
        self._files[index] = path
        if before is not None:  # not overwritten: a tensor mapped to it may still be read
            before.unlink()

    def release(self) -> None:
        if self._memory is not None:
            self._pool.left += self._memory.nbytes
            self._memory = None
        for path in self._files.values():
            path.unlink()
        self._files.clear()


def verify(written: ModelSource, offload: bool = False) -> None:
    """Check a pruned folder's tensors, as stored and as loaded; `VerificationError` names the first fault.

    `offload` loads block by block, for a model that does not fit in memory.
    """
    grids.verify(written)
    layers = manifest.read(written.folder)["layers"]
    try:
        model = loading.load_skeleton(written) if offload else loading.load_model(written)
        weights = StreamedWeights(written, model, "cpu") if offload else ResidentWeights(model)
        loading.load_processor(written)
    except ModelError as error:
        raise VerificationError(f"the written folder does not load: {error}") from error
    for index in range(len(weights.blocks)):
        with weights.block(index):
            for name in layers:
                if not name.startswith(f"{weights.prefix}.{index}."):
                    continue
                found, kept = count_nonzeros(weights.model.get_parameter(f"{name}.weight")), layers[name]["nonzeros"]
                if found != kept:
                    raise VerificationError(
                        f"{name}: transformers loads {found} nonzeros from the written folder, and {kept} were kept"
                    )
