"""A model's name and folder."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gblm_compress.models import files


@dataclass(frozen=True)
class ModelSource:
    """A model as the user named it, and the local folder that holds it. Damaged files raise `ModelError`."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return files.read_config(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files that make the model."""
        digest = hashlib.sha256()
        for path in files.files_of(self.folder):
            digest.update(path.name.encode() + b"\0" + bytes.fromhex(files.sha256_of(path)))
        return digest.hexdigest()

    @property
    def bytes_on_disk(self) -> int:
        return files.bytes_of(self.folder)

    @property
    def is_onnx(self) -> bool:
        return (self.folder / files.GRAPH).exists()

    @cached_property
    def operators(self) -> dict[str, int]:
        """{operator in the ONNX graph: how often}; this package's have the prefix "gblm."."""
        import onnx

        graph = onnx.load(self.folder / files.GRAPH, load_external_data=False).graph
        names = ("gblm." * (node.domain == "gblm") + node.op_type for node in graph.node)
        return dict(Counter(names).most_common())

    @property
    def needs_operator(self) -> bool:
        """Whether the graph uses this package's operators for ONNX Runtime (`export --kernels`)."""
        return self.is_onnx and any(name.startswith("gblm.") for name in self.operators)

    @property
    def is_packed(self) -> bool:
        return (self.config.get("quantization_config") or {}).get("quant_method") == files.SPARSE_METHOD

    @property
    def is_export(self) -> bool:
        return self.is_onnx or self.is_packed


class Outline(ModelSource):
    """A model on the hub without its weights: the files hold headers alone."""

    fingerprint = ""
