"""The places of a tensor that are trained, so that what is pruned needs no master, no gradient and no moments."""

from torch import Tensor


class Survivors:
    """Packs a dense tensor to the values at its trained places, and puts them back.

    Args:
        places: bool, in the shape of the tensor, True where it is trained; None where all of it is.
    """

    def __init__(self, places: Tensor | None = None) -> None:
        self._places = places

    def pack(self, dense: Tensor) -> Tensor:
        """The trained values [survivors] in the order of the tensor; the tensor itself where all are trained."""
        return dense if self._places is None else dense.masked_select(self._places)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, differentiable: zero everywhere else."""
        if self._places is None:
            return packed
        return packed.new_zeros(self._places.shape).masked_scatter(self._places, packed)
