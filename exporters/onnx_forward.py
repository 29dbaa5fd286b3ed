"""The ONNX graph of a model that generates nothing: one forward pass of a task's samples, by transformers' exporter.

Inputs and outputs have the names that optimum's classes for these tasks look for.
"""

from typing import Any

import onnx_ir as ir

from gblm_compress.exporters.onnx_plain import graph_of, tracing
from gblm_compress.exporters.onnx_slim import slim_
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks import task_of

# Names of dynamic dimensions, for inputs and outputs of that many.
_DIMENSIONS = {
    1: ("batch_size",),
    2: ("batch_size", "sequence_length"),
    3: ("batch_size", "sequence_length", "width"),
    4: ("batch_size", "num_channels", "height", "width"),
}


def build(model: Any, source: ModelSource) -> tuple[ir.Model, dict[str, Any]]:
    """Trace the model.

    Returns:
        The graph, and no `genai_config.json`.

    Raises:
        ModelError: transformers' exporter does not manage the architecture.
    """
    task = task_of(type(model))
    with tracing(model, source):
        program = graph_of(model, dict(task.example(model.config)), task.varying_axes)
    # optimum's classes take the first output, and a pooler that nobody asks for would be computed
    program.graph.outputs[:] = [value for value in program.graph.outputs if value.name == task.output]
    slim_(program)
    for value in (*program.graph.inputs, *program.graph.outputs):
        assert value.shape is not None
        names = _DIMENSIONS[len(value.shape)]
        value.shape = ir.Shape(
            [
                dimension if isinstance(dimension, int) else name
                for name, dimension in zip(names, value.shape, strict=True)
            ]
        )
    return program, {}
