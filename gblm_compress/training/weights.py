"""The trained weights of a network: float32 masters of the surviving weights, and the parameters made from them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gblm_compress.calibration.blocks import only_requires_grad
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.quantisation import Grid, rounded, straight_through
from gblm_compress.methods.zeros import positive_zeros
from gblm_compress.models.architecture import as_matrix, weight_matrix

PIECE = 2**20  # values of a tensor that are packed or spread at once
SCALE_RATE = 0.1  # learning rate of a scale, relative to a weight's: a scale moves a whole group


class Survivors(nn.Module):
    """Parametrisation of a sparse tensor by its surviving values [survivors], in row order."""

    def __init__(self, alive: Tensor) -> None:
        super().__init__()
        self.shape = alive.shape
        rows = alive.flatten(0, -2)
        self._step = max(1, PIECE // max(1, rows.shape[1]))  # rows of a piece
        narrow = rows.shape[1] <= torch.iinfo(torch.int16).max
        # At 50 % density, columns take no more bytes than a mask. They are several times as fast on a CPU.
        pieces, counts = torch.split(rows, self._step), rows.sum(1)
        self._columns = [piece.nonzero()[:, 1].to(torch.int16 if narrow else torch.int32) for piece in pieces]
        self._counts = torch.split(counts, self._step)
        lengths = torch.unique(counts).tolist()
        self._each = lengths[0] if len(lengths) == 1 else None  # equal rows are several times as fast

    def forward(self, packed: Tensor) -> Tensor:
        spread: Tensor = _Spread.apply(packed, self)  # type: ignore[no-untyped-call, unused-ignore]
        return spread

    def right_inverse(self, dense: Tensor) -> Tensor:
        return torch.cat([rows.flatten().index_select(0, places) for rows, places in self.pieces(dense, torch.int32)])

    def pieces(self, dense: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of a tensor at a time, and the places of their survivors in them.

        The places of all rows at once would take as much memory as the tensor.
        """
        rows = torch.split(dense.reshape(-1, self.shape[-1]), self._step)
        for piece, columns, counts in zip(rows, self._columns, self._counts, strict=True):
            starts = torch.arange(0, piece.numel(), piece.shape[1], dtype=dtype, device=dense.device)
            if self._each is not None:
                yield piece, (columns.view(len(piece), self._each) + starts[:, None]).flatten()
            else:
                yield piece, columns + starts.repeat_interleave(counts, output_size=len(columns))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, survivors: Survivors) -> Tensor:
        ctx.survivors = survivors
        dense, first = packed.new_zeros(survivors.shape), 0
        for rows, places in survivors.pieces(dense, torch.int64):
            rows.view(-1).scatter_(0, places, packed[first : first + len(places)])
            first += len(places)
        return dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.survivors.right_inverse(gradient), None


class OnGrid(nn.Module):
    """Parametrisation of a weight on a grid by unrounded values, and by factors [rows, groups] of the grid's scales.

    `as_matrix` turns the stored layout into [out_features, in_features], and back.
    """

    def __init__(self, grid: Grid, factors: Tensor | None, as_matrix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._grid, self._as_matrix = grid, as_matrix
        self.factors = nn.Parameter(torch.ones_like(grid.scales.float()) if factors is None else factors.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return self._as_matrix(straight_through(self._as_matrix(weight), self._stretch(), self._grid))

    @property
    def grid(self) -> Grid:
        return self._grid.stretched(self._stretch().detach())

    def _stretch(self) -> Tensor:
        return 1 + SCALE_RATE * (self.factors - 1)


class Master(nn.Module):
    """The float32 master of one tensor, which begins at `start`; all values are trained if `survivors` is None.

    With the mask `keep`, pruned weights accumulate steps while the network sees zeros (the straight-through estimator
    of SR-STE, arXiv 2102.04010).
    """

    weight: Tensor
    gathered: Tensor | None

    def __init__(self, start: Tensor, survivors: Survivors | None, grid: OnGrid | None, keep: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.detach().float().clone(memory_format=torch.contiguous_format))
        self.register_buffer("gathered", None if keep is None else torch.zeros_like(self.weight))
        self._parts, self._keep = (survivors, grid), keep
        for one in self._parts:
            if one is not None:
                parametrize.register_parametrization(self, "weight", one, unsafe=True)

    @property
    def trained(self) -> nn.Parameter:
        return self.parametrizations.weight.original if parametrize.is_parametrized(self) else self.weight  # type: ignore

    @property
    def values(self) -> Tensor:
        """Values before rounding, in the stored layout."""
        survivors, dense = self._parts[0], self.trained.detach()
        dense = dense if survivors is None else survivors(dense)
        return dense if self.gathered is None else dense + self.gathered

    def pull(self, gradient: Tensor) -> None:
        """Take the network's gradient, packed to the survivors."""
        survivors, grid = self._parts
        if grid is None:
            self.trained.grad = gradient
            return
        with torch.enable_grad():
            self.weight.backward(gradient if survivors is None else survivors(gradient))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def settle_(self) -> None:
        """Accumulate the last step of pruned weights, then set them to zero."""
        if self.gathered is not None and self._keep is not None:
            self.gathered.add_(self.trained * ~self._keep)
            self.trained.mul_(self._keep)


class Weights:
    """The trained tensors of a network: its `parameters`, and the `masters` of this process.

    One process owns each tensor (ZeRO stage 1, arXiv 1910.02054). It keeps the master and Adam's state. It receives the
    sum of the gradients, and sends the new values to all processes.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],  # by the name of the weight; their zeros stay
        grids: Mapping[str, Grid],
        others: Mapping[str, nn.Parameter] | None = None,  # dense parameters to train
        *,
        start: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,  # `Master.values`, factors of the scales
        revive: bool = False,  # let pruned weights accumulate steps, see `Master`
        ranks: Ranks | None = None,
    ) -> None:
        self.layers, self.ranks = layers, ranks or Ranks()
        self.parameters = {name: layer.get_parameter("weight") for name, layer in layers.items()} | dict(others or {})
        self._owner = owners({name: one.numel() for name, one in self.parameters.items()}, self.ranks.size)
        self._survivors: dict[str, Survivors | None] = dict.fromkeys(self.parameters)
        self._gradients: dict[str, Tensor] = {}
        self.masters: dict[str, Master] = {}
        self._on: dict[str, OnGrid] = {}
        for name, parameter in self.parameters.items():
            values, factors = (start or {}).get(name, (parameter.detach(), None))
            keep = None
            if layer := layers.get(name):
                keep = values != 0
                if name in grids:
                    self._on[name] = OnGrid(grids[name], factors, partial(as_matrix, layer))
                if not revive:
                    self._survivors[name], keep = None if keep.all() else Survivors(keep), None
            if self._owner[name] == self.ranks.rank:
                self.masters[name] = Master(values, self._survivors[name], self._on.get(name), keep)

    @contextmanager
    def trained_in(self, network: nn.Module) -> Iterator[None]:
        """Let only these tensors require gradients, and collect the gradients."""
        with only_requires_grad(network, self.parameters.values()), ExitStack() as hooks:
            for name, one in self.parameters.items():
                gather = partial(self._gather, name)
                hooks.enter_context(one.register_post_accumulate_grad_hook(gather))  # type: ignore[no-untyped-call]
            yield

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def count(self) -> int:
        return sum(master.trained.numel() for master in self.masters.values())

    @property
    def values(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{name: `Master.values`, factors of the scales} of all tensors, on every process."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, parameter in self.parameters.items():
            master, on = self.masters.get(name), self._on.get(name)
            values = master.values if master else torch.empty(parameter.shape, device=parameter.device)
            self.ranks.send_(values, self._owner[name])
            found[name] = values, self._sent(name, on).factors.detach() if on else None
        return found

    @torch.no_grad()
    def show(self) -> None:
        """Write the masters into the parameters, on every process."""
        for name, parameter in self.parameters.items():
            if name in self.masters:
                parameter.copy_(self.masters[name].weight)
            self.ranks.send_(parameter.detach(), self._owner[name])

    def pull(self) -> None:
        """Sum the gradients over all processes and pass them to the masters; a tensor without gradients keeps None."""
        came = torch.tensor([float(name in self._gradients) for name in self.parameters], device=self.device)
        self.ranks.sum_([came])
        for name, any_came in zip(self.parameters, came.tolist(), strict=True):
            if not any_came:
                continue
            gradient = self._gradients.pop(name, None)
            if gradient is None:
                gradient = self._packed(name, torch.zeros_like(self.parameters[name], dtype=torch.float32))
            self.ranks.sum_to_(gradient, self._owner[name])
            if name in self.masters:
                self.masters[name].pull(gradient)

    @torch.no_grad()
    def finish(self) -> dict[str, Grid]:
        """Write the masters into the network, with +0.0 zeros, and return {name of the weight: grid} as trained."""
        self.show()
        for parameter in self.parameters.values():
            parameter.copy_(positive_zeros(parameter))
        return {name: self._sent(name, on).grid for name, on in self._on.items()}

    def state(self) -> dict[str, Tensor]:
        """{"name part": tensor}, of this process's masters."""
        return {
            f"{name} {part}": one for name, master in self.masters.items() for part, one in master.state_dict().items()
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, one in self.state().items():
            one.copy_(state[name])

    def _sent(self, name: str, on: OnGrid) -> OnGrid:
        """The grid with its owner's factors."""
        self.ranks.send_(on.factors.detach(), self._owner[name])
        return on

    def _packed(self, name: str, dense: Tensor) -> Tensor:
        survivors = self._survivors[name]
        return dense if survivors is None else survivors.right_inverse(dense)

    def _gather(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = self._packed(name, parameter.grad).float()
        parameter.grad = None
        if name in self._gradients:
            self._gradients[name] += gradient
        else:
            self._gradients[name] = gradient


@torch.no_grad()
def write_(layer: nn.Module, values: Tensor, grid: Grid | None) -> None:
    """Copy values [out_features, in_features] into a layer in its dtype, rounded to the grid, with +0.0 zeros."""
    if grid is not None:
        values = rounded(values, values != 0, grid)
    weight = weight_matrix(layer)
    weight.copy_(positive_zeros(values.to(weight.dtype)))  # the cast may make -0.0 of a small weight


def owners(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """{name: process}: the largest tensors first, each to the process with the fewest values."""
    load = [0] * processes
    owner = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner
