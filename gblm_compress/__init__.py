"""Prune Hugging Face language models, export them, and measure what it really buys.

Importing this package loads neither torch nor transformers, so that the command line answers at once;
the names in `__all__` are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gblm_compress.exporters.semi_structured import load_sparse as load_sparse

__version__ = "0.1.0"

_HOME_OF = {"load_sparse": "gblm_compress.exporters.semi_structured"}
__all__ = ["__version__", "load_sparse"]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
