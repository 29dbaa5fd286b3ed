"""Several processes on one run, started by torchrun: each measures its share of the samples, and sums go over all.

Each decides the same, from the same sums; the first alone writes.
"""

import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from gblm_compress import __version__
from gblm_compress.errors import RankError, UsageError, first_line
from gblm_compress.machine import has_bfloat16

TIMEOUT = timedelta(minutes=30)  # for the work of another rank
BEAT, SILENCE = 1.0, timedelta(seconds=40)  # Every rank joins a sum each second; one that is silent for so long is lost
NOTICED = 10.0  # seconds for a waiting rank to see by itself that another is gone
T = TypeVar("T")


class Ranks:
    """This process within the run. `Ranks()` is a run of one process, which communicates nothing."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self._device = rank, size, device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, samples: Sequence[T], called: str = "samples") -> Sequence[T]:
        """This rank's part, in one piece."""
        if len(samples) < self.size:
            raise UsageError(f"{len(samples)} {called} cannot be split over {self.size} processes; give more --samples")
        return samples[self._part(len(samples))]

    def _part(self, count: int) -> slice:
        return slice(*(count * (self.rank + one) // self.size for one in (0, 1)))

    def by_rows(self, compute: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
        """`compute` of matrices, of whose rows each counts alone; every rank computes a part of the rows."""
        if self.size == 1:
            return compute(*matrices)
        rows, result = self._part(len(matrices[0])), torch.zeros_like(matrices[0])
        result[rows] = compute(*(matrix[rows] for matrix in matrices))
        self.sum_([result])
        return result

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; all ranks must pass the same ones in the same order."""
        for tensor in tensors:
            self._together(distributed.all_reduce, tensor)

    def sum_to_(self, tensor: Tensor, owner: int) -> None:
        """As `sum_`, on the rank `owner` alone; on others the tensor is undefined afterwards."""
        self._together(distributed.reduce, tensor, owner)

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor on all ranks by the owner's."""
        self._together(distributed.broadcast, tensor, owner)

    def wait(self) -> None:
        self._together(distributed.barrier)

    def total(self, count: int) -> int:
        value = torch.tensor(count, device=self._device)
        self.sum_([value])
        return int(value)

    def every(self, yes: bool) -> bool:
        return self.total(int(yes)) == self.size

    def check_same(self, given: dict[str, Any]) -> None:
        """Raise UsageError on all ranks if these values, plain for JSON, differ between ranks."""
        sums = [zlib.crc32(json.dumps(one, sort_keys=True).encode()) for one in given.values()]
        own = torch.tensor(sums, device=self._device)
        first = own.clone()
        self.send_(first, 0)
        same = (own == first).int()
        self.sum_([same])
        if different := [name for name, count in zip(given, same.tolist(), strict=True) if count < self.size]:
            raise UsageError(
                f"the {self.size} processes of the run differ in {', '.join(different)}; give the same to all of them"
            )

    def _together(self, act: Callable[..., Any], *arguments: Any) -> None:
        """Run a collective operation; a single rank skips it."""
        if self.size == 1:
            return
        try:
            act(*arguments)
        except RuntimeError as error:
            raise RankError(self.lost(error)) from error

    def lost(self, error: RuntimeError) -> str:
        why = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0]  # without gloo's lines of code and details
        return (
            f"rank {self.rank} of {self.size}: another process of the run ended or does not answer ({why}); its own "
            "message is further up. The same command with --resume continues from the kept work"
        )


@contextmanager
def joined(device: str, given: dict[str, Any]) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or the only one.

    `UsageError` if their versions or `given` values differ, `RankError` if they lose each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    try:
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        alive = distributed.new_group(backend="gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the {size} processes of the run cannot reach each other: {error}") from error
    ranks, leaves = Ranks(distributed.get_rank(), size, device), threading.Event()
    watch = threading.Thread(target=_watch, args=(ranks, alive, leaves), daemon=True)
    watch.start()
    try:
        ranks.check_same({"version": __version__} | given)
        yield ranks
    finally:
        leaves.set()
        watch.join()
        distributed.destroy_process_group()


def _watch(ranks: Ranks, group: distributed.ProcessGroup, leaves: threading.Event) -> None:
    """Check that all ranks are alive until one leaves; end this process if one is lost."""
    left = torch.zeros(())
    try:
        while not left:
            left.fill_(leaves.wait(BEAT))
            distributed.all_reduce(left, group=group)
    except RuntimeError as error:
        if not leaves.wait(NOTICED):
            print(f"error: {ranks.lost(error)}", file=sys.stderr, flush=True)
            os._exit(RankError.exit_code)


def faster_dtype(device: str, group: Ranks) -> str:
    """bfloat16 if the devices of all ranks have instructions for it, else float32."""
    return "bfloat16" if group.every(has_bfloat16(device)) else "float32"


def is_first_started() -> bool:
    """As `Ranks.is_first`, before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def processes_here() -> int:
    """How many processes of the run share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_of_rank(device: str) -> str:
    """`cuda` becomes this process's GPU if torchrun has started it."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device
