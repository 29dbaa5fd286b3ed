"""How zeros are packed, and the linear layers that multiply packed weights: one file and one line in `LAYOUTS` each.

See docs/adding-a-layout.md. Importing this registry loads no torch.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from gblm_compress.errors import ModelError

if TYPE_CHECKING:
    from gblm_compress.layouts.packed_linear import PackedLinear


@dataclass(frozen=True)
class Layout:
    """What is said of a layout before its file is imported.

    Attributes:
        linear: its `PackedLinear`, as "module:class"; imported on use.
        format: what `export --format` calls it.
        kernels: the devices that have kernels for it; on others the weight is unpacked for every product.
        pattern: the N:M that a weight must have; any if unset.
        width: bits of a stored weight; those of the dtype if unset.
        exact: the layout for a layer that this one would round too much; None where it rounds nothing.
        tables: the layout for the model's head and embedding; None where these stay as they are.
    """

    linear: str
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
    def layer(self) -> "type[PackedLinear]":
        """The class of its layers."""
        module, _, name = self.linear.partition(":")
        layer: type[PackedLinear] = getattr(import_module(module), name)
        return layer


def _quantised(linear: str, format: str, width: int, pattern: str | None = None) -> Layout:
    module = f"gblm_compress.layouts.{linear}"
    return Layout(module, format, ("cpu", "cuda"), pattern, width=width, exact="bitmask", tables="int8")


# A folder's config.json has the name; commands and recipes have the format.
LAYOUTS = {
    "bitmask": Layout("gblm_compress.layouts.bitmask:BitmaskLinear", "bitmask", ("cpu", "cuda")),
    "sparse24": Layout("gblm_compress.layouts.sparse24:Sparse24Linear", "semi-structured", ("cuda",), "2:4"),
    "bitmask-int8": _quantised("bitmask_quantised:BitmaskInt8Linear", "bitmask-int8", 8),
    "bitmask-int4": _quantised("bitmask_quantised:BitmaskInt4Linear", "bitmask-int4", 4),
    "sparse24-int8": _quantised("sparse24_quantised:Sparse24Int8Linear", "semi-structured-int8", 8, "2:4"),
    "sparse24-int4": _quantised("sparse24_quantised:Sparse24Int4Linear", "semi-structured-int4", 4, "2:4"),
    "int8": _quantised("int8:Int8Linear", "int8", 8),
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
