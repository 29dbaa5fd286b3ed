"""Hidden states between blocks: in memory while a budget lasts, beyond it in files.

They are scratch: an interrupted run computes them again.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class StatePool:
    """What all hidden states of a run may take together.

    Args:
        folder: an empty folder for what does not fit.
        budget: bytes of memory on the host.
        device: where the blocks run.
    """

    def __init__(self, folder: Path, budget: int, device: torch.device) -> None:
        self.left, self.device = budget, device
        self._folder, self._names = folder, count()

    def states(self, samples: int) -> "HiddenStates":
        """Room for the states of that many samples at one place between blocks."""
        return HiddenStates(self, samples)

    def new_file(self) -> Path:
        """A path that nothing uses yet."""
        return self._folder / f"{next(self._names)}.safetensors"


class HiddenStates(Sequence[Tensor]):
    """The hidden states [1, length, hidden size] of every sample at one place, on the device whenever they are read.

    They lie in one piece of memory, for all samples, or in a file each: many pieces among the
    short-lived ones of a forward pass would keep the allocator from giving those back.
    """

    def __init__(self, pool: StatePool, samples: int) -> None:
        self._pool = pool
        self._memory: Tensor | None = None
        self._files: list[Path | None] = [None] * samples

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if self._memory is not None:
            return self._memory[index : index + 1].to(self._pool.device, non_blocking=True)
        path = self._files[index]
        assert path is not None, "read before it was written, or after it was released"
        return load_file(path)["states"].to(self._pool.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: int, states: Tensor) -> None:
        states = states.detach()
        if self._memory is None and not any(self._files) and len(self) * states.nbytes <= self._pool.left:
            self._memory = _on_host(len(self), states)
            self._pool.left -= self._memory.nbytes
        if self._memory is not None:
            self._memory[index : index + 1].copy_(states)
            return
        before, path = self._files[index], self._pool.new_file()
        save_file({"states": states.cpu().contiguous()}, path)
        self._files[index] = path
        if before is not None:  # not overwritten: somebody may still read a tensor that is mapped to it
            before.unlink()

    def release(self) -> None:
        """Give memory and files back; the states are gone."""
        if self._memory is not None:
            self._pool.left += self._memory.nbytes
            self._memory = None
        for index, path in enumerate(self._files):
            if path is not None:
                path.unlink()
                self._files[index] = None


def _on_host(samples: int, like: Tensor) -> Tensor:
    """Room for the states of all samples in the host's memory, page-locked where they travel to a GPU and back."""
    return torch.empty(samples, *like.shape[1:], dtype=like.dtype, pin_memory=like.device.type == "cuda")
