"""How zeros are packed: a kind of mask and a kind of values make a layout, in one line of `LAYOUTS`.

See docs/adding-a-layout.md. Importing this registry loads no torch.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import ModelError

if TYPE_CHECKING:
    from gblm_compress.layouts.values import Floats


@dataclass(frozen=True)
class Layout:
    """What is said of a layout before its files are imported.

    Attributes:
        mask, values: its kinds, as "module:class"; imported on use.
        format: what `export --format` calls it.
        kernels: the devices that have kernels for it; on others the weight is unpacked for every product.
        pattern: the N:M that a weight must have; any if unset.
        width: bits of a stored weight; those of the dtype if unset.
        exact: the layout for a layer that this one would round too much; None where it rounds nothing.
        tables: the layout for the model's head and embedding; None where these stay as they are.
    """

    mask: str
    values: str
    format: str
    kernels: tuple[str, ...]
    pattern: str | None = None
    width: int | None = None
    exact: str | None = None
    tables: str | None = None

    @property
    def needs_cuda(self) -> bool:
        """Whether only CUDA has kernels for it."""
        return self.kernels == ("cuda",)

    @property
    def kind(self) -> "Floats":
        """The kind of values, which has the kind of mask."""
        return _kind(self.mask, self.values)


@cache
def _kind(mask: str, values: str) -> Any:
    def named(path: str) -> Any:
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)

    return named(values)(named(mask)())


def _layout(mask: str, values: str, format: str, pattern: str | None = None, **more: Any) -> Layout:
    kinds = f"{__name__}.masks:{mask}", f"{__name__}.values:{values}"
    return Layout(*kinds, format, more.pop("kernels", ("cpu", "cuda")), pattern, **more)


_ROUNDS = {"exact": "bitmask", "tables": "int8"}
# A folder's config.json has the name; commands and recipes have the format.
LAYOUTS = {
    "bitmask": _layout("Bitmask", "Floats", "bitmask"),
    "sparse24": _layout("Positions", "Floats", "semi-structured", "2:4", kernels=("cuda",)),
    "bitmask-int8": _layout("Bitmask", "Levels", "bitmask-int8", width=8, **_ROUNDS),
    "bitmask-int4": _layout("Bitmask", "Places", "bitmask-int4", width=4, **_ROUNDS),
    "sparse24-int8": _layout("Patterns", "Levels", "semi-structured-int8", "2:4", width=8, **_ROUNDS),
    "sparse24-int4": _layout("Patterns", "Places", "semi-structured-int4", "2:4", width=4, **_ROUNDS),
    "int8": _layout("Whole", "Levels", "int8", width=8, **_ROUNDS),
}


def check_described(layout: object, layers: object) -> None:
    """Hold what a folder's config.json says of layout and layers against what this version reads.

    Raises:
        ModelError: it says of none.
    """
    if known(layout) is None:
        raise ModelError(
            f"layout {layout!r} is not known; this version reads {', '.join(LAYOUTS)}; a newer gblm-compress may "
            "have packed the folder"
        )
    if not isinstance(layers, dict) or not layers:
        raise ModelError("quantization_config names no packed layers, so it is damaged")


def known(name: object) -> Layout | None:
    """The layout of that name, which a file may have damaged; None where there is none."""
    return LAYOUTS.get(name) if isinstance(name, str) else None
