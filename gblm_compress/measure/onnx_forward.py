"""ONNX Runtime on the exported folder of a model that generates nothing: one forward pass for a batch of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gblm_compress.measure.onnx_session import ONNX_TYPES, OnnxSession, kernels_of, other_interface
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Sample


class OnnxForward:
    """A graph whose inputs are the arguments of a task's samples, and one of whose outputs is the prediction."""

    def __init__(self, source: ModelSource, device: str, threads: int, *, profile: Sequence[int] = ()) -> None:
        self._task, self._name = loading.task_of(source), source.name
        self._opened = OnnxSession(source, device, threads, profile=bool(profile))
        self.provider = self._opened.provider
        self._inputs = [value.name for value in self._opened.session.get_inputs()]
        outputs = {value.name: value.type for value in self._opened.session.get_outputs()}
        if outputs.get(self._task.output) not in ONNX_TYPES:
            raise other_interface(source.name, f"it has no output {self._task.output!r} of floating-point numbers")
        self.dtype = ONNX_TYPES[outputs[self._task.output]]
        config = loading.config_of(source)
        counts = sorted(set(profile))

        def run(tokens: int) -> int:
            self.predict(self._task.timed(config, 1, tokens, seed=0))
            return 1

        self._kernels = self._opened.profiled(counts, run) if counts else {}

    def predict(self, sample: Sample) -> Tensor:
        if missing := [name for name in self._inputs if name not in sample]:
            raise other_interface(self._name, f"input {missing[0]!r} is not known")
        floats = {"float32": torch.float32, "float16": torch.float16}[self.dtype]
        given = {
            name: (sample[name].to(floats) if sample[name].is_floating_point() else sample[name]).numpy()
            for name in self._inputs
        }
        with self._opened.named_errors("run"):
            (prediction,) = self._opened.session.run([self._task.output], given)
        return torch.from_numpy(prediction).float()

    def step_ms(self) -> dict[str, float]:
        return self._opened.step_ms

    def kernels(self, tokens: int) -> dict[str, int]:
        return kernels_of(self._kernels, tokens)
