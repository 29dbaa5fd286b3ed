"""Prune Hugging Face models, export them, and measure the gain. Importing this loads no torch and no transformers."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gblm_compress.errors import GblmError

if TYPE_CHECKING:
    from gblm_compress.api import *  # noqa: F403
    from gblm_compress.kernels.cpu import onnxruntime_library

__version__ = "0.2.0"

__all__ = [  # noqa: F405
    "GblmError", "__version__", "advise", "benchmark", "compare", "evaluate", "export", "inspect", "load",
    "onnxruntime_library", "plan", "prune", "push", "recover", "report", "run",
]  # fmt: skip
if not (Path(__file__).parent / "cli").is_dir():  # a checkout on Windows, where git makes no links
    __path__.append(str(Path(__file__).parents[1]))  # noqa: F405


def __getattr__(name: str) -> object:
    if name in __all__:
        home = "kernels.cpu" if name == "onnxruntime_library" else "api"
        return getattr(import_module(f"gblm_compress.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _SparseCheckpoints:
    """Registers our sparse checkpoints once transformers' quantizers are imported, not earlier."""

    TRIGGER = "transformers.quantizers"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_register(module: ModuleType) -> None:
                execute(module)
                import_module("gblm_compress.models.packed_checkpoint")

            spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


if _SparseCheckpoints.TRIGGER in sys.modules:
    import_module("gblm_compress.models.packed_checkpoint")
else:
    sys.meta_path.insert(0, _SparseCheckpoints())
