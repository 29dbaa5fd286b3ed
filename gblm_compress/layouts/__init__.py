"""How zeros are packed: a kind of mask and a kind of values make a layout, in one line of `LAYOUTS`.

See docs/adding-a-layout.md. Importing this registry loads no torch.
"""

from dataclasses import dataclass
from functools import cached_property
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import ModelError

if TYPE_CHECKING:
    from gblm_compress.layouts.values import Floats


@dataclass(frozen=True)
class Layout:
    """A layout, before its files are imported."""

    mask: str  # "module:class", as `values`
    values: str
    format: str  # its name in `export --format`
    kernels: tuple[str, ...] = ("cpu", "cuda")  # devices with kernels; others unpack the weight for every product
    pattern: str | None = None  # the N:M that a weight must have
    width: int | None = None  # bits of a stored weight; None: as many as the dtype
    exact: str | None = None  # the layout for layers that this one would round too much
    tables: str | None = None  # the layout of head and embedding; None: they stay dense

    @property
    def needs_cuda(self) -> bool:
        return self.kernels == ("cuda",)

    @property
    def needs_zeros(self) -> bool:
        return not self.mask.endswith(":Whole")

    @cached_property
    def kind(self) -> "Floats":
        kind: Floats = resolve_name(self.values)(resolve_name(self.mask)())
        return kind


def _layout(mask: str, values: str, format: str, **more: Any) -> Layout:
    return Layout(f"{__name__}.masks:{mask}", f"{__name__}.values:{values}", format, **more)


_ROUNDS = {"exact": "bitmask", "tables": "int8"}
# A folder's config.json has the name; commands and recipes have the format.
LAYOUTS = {
    "bitmask": _layout("Bitmask", "Floats", "bitmask"),
    "sparse24": _layout("Positions", "Floats", "semi-structured", pattern="2:4", kernels=("cuda",)),
    "bitmask-int8": _layout("Bitmask", "Levels", "bitmask-int8", width=8, **_ROUNDS),
    "bitmask-int4": _layout("Bitmask", "Places", "bitmask-int4", width=4, **_ROUNDS),
    "int8": _layout("Whole", "Levels", "int8", width=8, **_ROUNDS),
}


def check_described(layout: object, layers: object) -> None:
    """ModelError unless this version reads the layout and layers that a folder's config.json names."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ModelError(
            f"layout {layout!r} is not known; this version reads {', '.join(LAYOUTS)}; an older or newer "
            "gblm-compress may have packed the folder, so export the pruned model again"
        )
    if not isinstance(layers, dict) or not layers:
        raise ModelError("quantization_config names no packed layers, so it is damaged")
