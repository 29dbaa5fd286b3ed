"""How many tokens a traced graph reads at once.

Tracing turns the chunks of a recurrence into as many nodes as there were chunks, which is one. The graph then takes as
many tokens as a chunk has, and more in several calls, since its states go on.
"""

from pathlib import Path

import onnx
import torch

from gblm_compress.errors import ModelError
from gblm_compress.measure.onnx_runtime import AT_ONCE, OnnxRuntime
from gblm_compress.models.files import GRAPH
from gblm_compress.models.source import ModelSource

CHUNKS = (16, 32, 64, 128, 256, 512)
"""Tokens that a chunk may have; the recurrences of transformers have 64 to 256."""


def note_limit(folder: Path, name: str) -> int | None:
    """Find the limit of a folder's graph by running it, and write it into the graph, where `OnnxRuntime` reads it.

    Args:
        folder: whose graph has a recurrence.

    Returns:
        Tokens; None where no number of them is too large.

    Raises:
        ModelError: the graph does not even read as many tokens as the smallest chunk has.
    """
    runtime = OnnxRuntime(ModelSource(name, folder), "cpu", torch.get_num_threads())
    if not _reads(runtime, CHUNKS[0]):
        raise ModelError(
            f"{name!r}: tracing keeps a fixed number of steps of its recurrence; export to a sparse PyTorch format"
        )
    limit = next((chunk for chunk in CHUNKS if not _reads(runtime, chunk + 1)), None)
    if limit is not None:
        graph = onnx.load(folder / GRAPH, load_external_data=False)
        graph.metadata_props.add(key=AT_ONCE, value=str(limit))
        onnx.save(graph, folder / GRAPH)
    return limit


def _reads(runtime: OnnxRuntime, tokens: int) -> bool:
    try:
        runtime.predict({"input_ids": torch.zeros(1, tokens, dtype=torch.int64)})
    except ModelError:
        return False
    return True
