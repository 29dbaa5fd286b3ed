"""Optimisers of a training: how many bytes a weight's moments take, and what of them a checkpoint keeps.

Add one by writing it and listing it in `OPTIMISERS`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
"""Moments of 8 bits that share a scale, in bitsandbytes."""


@dataclass(frozen=True)
class Optimiser:
    """An entry of `OPTIMISERS`: Adam as torch has it.

    Attributes:
        help: what is special about it, as half a sentence for `--help` and the recipe reference.
        moment_bytes: of both moments of a weight.
        extra: the optional dependency of this project that brings it, and `package` the module; "" where torch has it.
    """

    help: str
    moment_bytes: float
    extra: str = ""
    package: str = ""

    def check(self) -> None:
        """Raises:
        UsageError: it is not installed.
        """
        if self.package and find_spec(self.package) is None:
            raise UsageError(
                f"this optimiser is that of {self.package}, which is not installed; "
                f"pip install 'gblm-compress[{self.extra}]'"
            )

    def build(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float]) -> Any:
        """The optimiser of parameter groups, as those of `torch.optim`, each of one tensor."""
        import torch

        return torch.optim.Adam(groups, betas=betas)

    def state(self, built: Any, master: Tensor) -> dict[str, Tensor]:
        """What it knows of a tensor, from which `restore` goes on to the same bits; nothing before the first step."""
        return dict(built.state.get(master, {}))

    def restore(self, built: Any, master: Tensor, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` gave of a tensor."""
        # Adam counts its steps on the host.
        built.state[master] = {part: one if part == "step" else one.to(master.device) for part, one in state.items()}

    def power(self, built: Any, master: Tensor) -> Tensor:
        """The second moment of a tensor, in float32 and its shape; zero before the first step."""
        import torch

        known = built.state.get(master, {})
        moment: Tensor = known["exp_avg_sq"] if known else torch.zeros_like(master)
        return moment


class EightBits(Optimiser):
    """Adam of bitsandbytes (arXiv 2110.02861): moments in 8 bits, 256 to a scale; in 32 those of tensors with fewer
    than 4,096 numbers."""

    def build(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float]) -> Any:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells what it would need for other purposes
        from bitsandbytes.optim import Adam8bit

        return Adam8bit(groups, betas=betas)

    def state(self, built: Any, master: Tensor) -> dict[str, Tensor]:
        import torch

        known = built.state.get(master, {})
        kept = {part: one for part, one in known.items() if part.startswith(("state", "absmax"))}
        return kept | {"step": torch.tensor(known["step"])} if known else {}

    def restore(self, built: Any, master: Tensor, state: Mapping[str, Tensor]) -> None:
        built.init_state(built.param_groups[0], master, 0, 0)  # groups differ in rates alone
        for part, one in state.items():
            if part == "step":
                built.state[master][part] = int(one)
            else:
                built.state[master][part].copy_(one)

    def power(self, built: Any, master: Tensor) -> Tensor:
        import torch
        from bitsandbytes.functional import dequantize_blockwise

        known = built.state.get(master, {})
        moment: Tensor = known["state2"] if known else torch.zeros_like(master)
        if "absmax2" in known:
            moment = dequantize_blockwise(moment, absmax=known["absmax2"], code=known["qmap2"], blocksize=BLOCK)
        return moment


OPTIMISERS: dict[str, Optimiser] = {
    "adam": Optimiser("moments in float32, 8 bytes a weight", 8),
    "adam-8bit": EightBits(
        "moments in 8 bits, 2 bytes a weight (needs the extra adam-8bit)",
        2 + 2 * 4 / BLOCK,
        extra="adam-8bit",
        package="bitsandbytes",
    ),
}
"""All optimisers."""
