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
    """The hidden states [1, length, hidden size] of every sample at one place, on the device whenever they are read."""

    def __init__(self, pool: StatePool, samples: int) -> None:
        self._pool = pool
        self._held: list[Tensor | Path | None] = [None] * samples

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        held = self._held[index]
        assert held is not None, "read before it was written, or after it was released"
        tensor = load_file(held)["states"] if isinstance(held, Path) else held
        return tensor.to(self._pool.device, non_blocking=True)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: int, states: Tensor) -> None:
        self._release(index)
        states = states.detach()
        if states.nbytes <= self._pool.left:
            self._pool.left -= states.nbytes
            self._held[index] = _on_host(states)
        else:
            path = self._pool.new_file()
            save_file({"states": states.cpu().contiguous()}, path)
            self._held[index] = path

    def release(self) -> None:
        """Give memory and files back; the states are gone."""
        for index in range(len(self)):
            self._release(index)

    def _release(self, index: int) -> None:
        held = self._held[index]
        if isinstance(held, Path):
            held.unlink()
        elif held is not None:
            self._pool.left += held.nbytes
        self._held[index] = None


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor in the host's memory, page-locked where it came from a GPU, so that it travels back fast."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor)
