"""The trained weights of a network: float32 masters without the pruned weights, and what the network sees of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gblm_compress.calibration.blocks import only_requires_grad
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.quantisation import Grid, rounded, straight_through
from gblm_compress.methods.zeros import positive_zeros
from gblm_compress.models.architecture import as_matrix, weight_matrix

SCALE_RATE = 0.1
"""The step of a scale relative to the step of a weight: a scale moves a whole group."""


class Survivors(nn.Module):
    """Parametrisation of a tensor with zeros by its other values [survivors], in the order of the tensor.

    It keeps the column of each value rather than a mask: at half density in as many bytes, and several times as fast
    on a CPU.

    Args:
        alive: bool, True where a value is trained.
    """

    def __init__(self, alive: Tensor) -> None:
        super().__init__()
        self._shape = alive.shape
        rows = alive.flatten(0, -2)
        narrow = rows.shape[1] <= torch.iinfo(torch.int16).max
        self._columns = rows.nonzero()[:, 1].to(torch.int16 if narrow else torch.int32)
        self._counts = rows.sum(1)
        lengths = torch.unique(self._counts).tolist()
        self._each = lengths[0] if len(lengths) == 1 else None  # the usual case, and several times as fast

    def forward(self, packed: Tensor) -> Tensor:
        """The dense tensor, zero where nothing is trained."""
        return packed.new_zeros(self._shape.numel()).scatter_(0, self._places(torch.int64), packed).view(self._shape)

    def right_inverse(self, dense: Tensor) -> Tensor:
        """The trained values of a dense tensor."""
        narrow = dense.numel() <= torch.iinfo(torch.int32).max
        return dense.flatten().index_select(0, self._places(torch.int32 if narrow else torch.int64))

    def _places(self, dtype: torch.dtype) -> Tensor:
        starts = torch.arange(0, self._shape.numel(), self._shape[-1], dtype=dtype, device=self._columns.device)
        if self._each is not None:
            return (self._columns.view(len(starts), self._each) + starts[:, None]).flatten()
        return self._columns + starts.repeat_interleave(self._counts, output_size=len(self._columns))


class OnGrid(nn.Module):
    """Parametrisation of a weight by one that is not rounded, and by factors [rows, groups] of the grid's scales.

    Args:
        factors: of the scales at the start, 1 if unset.
        as_matrix: a tensor in the stored layout as [out_features, in_features], and back.
    """

    def __init__(self, grid: Grid, factors: Tensor | None, as_matrix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._grid, self._as_matrix = grid, as_matrix
        self.factors = nn.Parameter(torch.ones_like(grid.scales.float()) if factors is None else factors.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The survivors on the nearest points; gradients pass through."""
        return self._as_matrix(straight_through(self._as_matrix(weight), self._stretch(), self._grid))

    @property
    def grid(self) -> Grid:
        """The grid with its scales as they are now."""
        return self._grid.stretched(self._stretch().detach())

    def _stretch(self) -> Tensor:
        return 1 + SCALE_RATE * (self.factors - 1)


class Master(nn.Module):
    """What is trained of one tensor, in float32.

    Args:
        start: the values at the start, in the stored layout.
        survivors: None if every value is trained.
        grid: where the network sees the values, if on a grid.
        keep: the mask, where pruned weights gather steps although the network sees zeros: the straight-through
            estimator of SR-STE (arXiv 2102.04010), from which a new mask can be chosen.
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
        """What the optimiser moves, beside the factors of scales."""
        return self.parametrizations.weight.original if parametrize.is_parametrized(self) else self.weight  # type: ignore

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        """The values before rounding, in the stored layout, and the factors of the scales."""
        survivors, grid = self._parts
        dense = self.trained.detach()
        dense = dense if survivors is None else survivors(dense)
        factors = None if grid is None else grid.factors.detach()
        return dense if self.gathered is None else dense + self.gathered, factors

    def pull(self, gradient: Tensor) -> None:
        """Take the gradient of what the network saw, at the places that are trained."""
        survivors, grid = self._parts
        if grid is None:
            self.trained.grad = gradient
            return
        with torch.enable_grad():
            self.weight.backward(gradient if survivors is None else survivors(gradient))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def settle_(self) -> None:
        """After a step: gather the steps of pruned weights, and make these zero again."""
        if self.gathered is not None and self._keep is not None:
            self.gathered.add_(self.trained * ~self._keep)
            self.trained.mul_(self._keep)


class Weights:
    """The trained tensors of a network. Its parameters hold what it sees; the masters are apart.

    Several processes share the masters: each tensor has an owner, which keeps its master and the optimiser's state.
    Gradients are summed to the owner, which sends the new values to all (ZeRO stage 1, arXiv 1910.02054).

    Args:
        layers: {name of the weight in the network: pruned layer}; their zeros stay.
        grids: {name of the weight: grid}, of the layers that lie on one.
        others: {name: parameter} that is trained as a whole.
        start: {name of the weight: its values in the stored layout, and factors of its scales}, where these are not
            what the layer holds.
        revive: let pruned weights gather steps, see `Master`.

    Attributes:
        layers: as given.
        parameters: {name: parameter of the network}.
        masters: {name: master} of this process.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        grids: Mapping[str, Grid],
        others: Mapping[str, nn.Parameter] | None = None,
        *,
        start: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
        revive: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.layers, self._ranks = layers, ranks or Ranks()
        self.parameters = {name: layer.get_parameter("weight") for name, layer in layers.items()} | dict(others or {})
        self._owner = owners({name: one.numel() for name, one in self.parameters.items()}, self._ranks.size)
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
                    self._survivors[name], keep = Survivors(keep), None
            if self._owner[name] == self._ranks.rank:
                self.masters[name] = Master(values, self._survivors[name], self._on.get(name), keep)

    @contextmanager
    def trained_in(self, network: nn.Module) -> Iterator[None]:
        """Let autograd see these tensors of the network alone, and gather their gradients."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._gather, name))  # type: ignore[no-untyped-call]
            for name, parameter in self.parameters.items()
        ]
        try:
            with only_requires_grad(network, self.parameters.values()):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return next(iter(self.parameters.values())).device

    @property
    def count(self) -> int:
        """How many weights this process has the masters of."""
        return sum(master.trained.numel() for master in self.masters.values())

    @property
    def values(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{name: its values before rounding, in the stored layout, and the factors of its scales} of this process."""
        return {name: master.values for name, master in self.masters.items()}

    @torch.no_grad()
    def show(self) -> None:
        """Put what the network is to see into its parameters, on every process."""
        for name, parameter in self.parameters.items():
            if name in self.masters:
                parameter.copy_(self.masters[name].weight)
            self._ranks.send_(parameter.detach(), self._owner[name])

    def pull(self) -> None:
        """Sum what was gathered over all processes and pass it to the masters, which have none where no sample came
        through."""
        came = torch.tensor([float(name in self._gradients) for name in self.parameters], device=self.device)
        self._ranks.sum_([came])
        for name, any_came in zip(self.parameters, came.tolist(), strict=True):
            if not any_came:
                continue
            gradient = self._gradients.pop(name, None)
            if gradient is None:
                gradient = self._packed(name, torch.zeros_like(self.parameters[name], dtype=torch.float32))
            self._ranks.sum_to_(gradient, self._owner[name])
            if name in self.masters:
                self.masters[name].pull(gradient)

    @torch.no_grad()
    def finish(self) -> dict[str, Grid]:
        """Leave the network with the masters' values, its zeros +0.0.

        Returns:
            {name of the weight: its grid}, with the scales as trained, on every process.
        """
        self.show()
        for parameter in self.parameters.values():
            parameter.copy_(positive_zeros(parameter))
        for name, on in self._on.items():
            self._ranks.send_(on.factors.detach(), self._owner[name])
        return {name: on.grid for name, on in self._on.items()}

    def state(self) -> dict[str, Tensor]:
        """What is trained on this process, {name of the tensor and of its part: tensor}."""
        return {
            f"{name} {part}": one for name, master in self.masters.items() for part, one in master.state_dict().items()
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` gave."""
        for name, one in self.state().items():
            one.copy_(state[name])

    def _packed(self, name: str, dense: Tensor) -> Tensor:
        survivors = self._survivors[name]
        return dense if survivors is None else survivors.right_inverse(dense)

    def _gather(self, name: str, parameter: Tensor) -> None:
        """Add the gradient of a sample to those before, and let go of the dense one."""
        assert parameter.grad is not None
        gradient = self._packed(name, parameter.grad).float()
        parameter.grad = None
        if name in self._gradients:
            self._gradients[name] += gradient
        else:
            self._gradients[name] = gradient


@torch.no_grad()
def write_(layer: nn.Module, values: Tensor, grid: Grid | None) -> None:
    """Copy values [out_features, in_features] into a layer in its dtype, the survivors on their nearest points of a
    grid if there is one; zeros are +0.0.
    """
    if grid is not None:
        values = rounded(values, values != 0, grid)
    weight = weight_matrix(layer)
    weight.copy_(positive_zeros(values.to(weight.dtype)))  # only now: a small weight may have become -0.0


def owners(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """{name: process}, so that all have about as much: the largest first, each to the one that has least."""
    load = [0] * processes
    owner = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner
