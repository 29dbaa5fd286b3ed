"""Checks of zeros, NaN and infinity: on a CPU `masked_fill`, `isfinite` and sums of bool are 3 to 60 times slower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gblm_compress.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def keep_only(weight: Tensor, keep: Tensor) -> Tensor:
    """The finite weight, with +0.0 wherever it is zero or `keep` is False."""
    return (weight * keep).add_(0.0)


def positive_zeros(weight: Tensor) -> Tensor:
    """The weight with +0.0 for every -0.0: the sum of both is +0.0."""
    return weight + 0.0


def has_negative_zeros(weight: Tensor) -> bool:
    """Whether any zero is -0.0, the smallest integer by its bits."""
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return bool((weight.view(bits) == torch.iinfo(bits).min).any())


def count_nonzeros(weight: Tensor) -> int:
    import torch

    return int(torch.count_nonzero(weight != 0))


def made_zero(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[int, str, float] | None:
    """How many nonzeros a rounding made zero, the layer that lost the largest share, and that share; None if none."""
    lost = {name: count - after[name] for name, count in before.items() if after[name] < count}
    if not lost:
        return None
    share, worst = max((lost[name] / before[name], name) for name in lost)
    return sum(lost.values()), worst, share


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; the least and the greatest are NaN if one is."""
    import torch

    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def check_finite(name: str, what: str, values: Tensor) -> None:
    """Raise ModelError if `values` hold NaN or infinity; the message names the layer."""
    if not is_finite(values):
        bad = int((~values.isfinite()).sum())
        advice = (
            "the checkpoint is damaged"
            if what == "weights"
            else "compute in a wider range with --dtype float32 (or bfloat16 instead of float16)"
        )
        raise ModelError(f"{name}: {bad} of {values.numel()} {what} are NaN or infinite; {advice}")
