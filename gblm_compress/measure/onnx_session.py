"""A graph in ONNX Runtime: opened for a device, with this package's operators, and asked what it ran."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from gblm_compress.errors import MissingDependencyError, ModelError
from gblm_compress.kernels import cpu
from gblm_compress.measure.timings import Part
from gblm_compress.models.source import ModelSource

ONNX_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
PACKED = ("BitmaskLinear", "QuantisedLinear")  # operators of this package that read packed weights
WARM = 6  # runs of the smallest profile, of which all but the first count
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def check_onnx_provider(device: str) -> str:
    """The execution provider for a device.

    Raises:
        MissingDependencyError: the installed ONNX Runtime lacks it.
    """
    import onnxruntime

    provider = _PROVIDERS.get(device.partition(":")[0], device)
    if provider not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"ONNX Runtime {onnxruntime.__version__} has no {provider}; it has "
            f"{', '.join(onnxruntime.get_available_providers())}. See `gblm-compress doctor`"
        )
    return provider


class OnnxSession:
    """The graph of an exported folder.

    Attributes:
        session: ONNX Runtime's own.
        provider: where it runs.
        device, device_id: where its values are.
        step_ms: see `profiled`; empty before.
    """

    def __init__(self, source: ModelSource, device: str, threads: int, *, profile: bool = False) -> None:
        """Args:
        profile: whether `profiled` will be asked.
        """
        import onnxruntime

        self.step_ms: dict[str, float] = {}
        self.device, _, index = device.partition(":")
        self.device_id, self._name = int(index or 0), source.name
        provider = check_onnx_provider(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors come as exceptions
        if source.needs_operator:
            _register_operators(options)
        if profile:
            self._records = TemporaryDirectory()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._records.name) / "profile")
        providers = [(provider, {"device_id": str(self.device_id)})] if self.device == "cuda" else [provider]
        with self.named_errors("load"):
            self.session = onnxruntime.InferenceSession(source.folder / "model.onnx", options, providers=providers)
        self.provider: str = self.session.get_providers()[0]
        if self.provider != provider:
            raise MissingDependencyError(
                f"ONNX Runtime was asked for {provider} and fell back to {self.provider}; CUDA and cuDNN of the "
                "versions it was built for are needed"
            )

    @contextmanager
    def named_errors(self, verb: str) -> Iterator[None]:
        """Raises:
        ModelError: for whatever ONNX Runtime raises within the `with`.
        """
        try:
            yield
        except Exception as error:  # onnxruntime raises its own kinds, which share no base
            if isinstance(error, MemoryError):
                raise
            raise ModelError(f"{self._name!r}: ONNX Runtime cannot {verb} it ({str(error)[:300]})") from error

    def profiled(self, counts: Sequence[int], run: Callable[[int], int]) -> dict[int, dict[str, int]]:
        """{number of tokens: {operator (provider): how often it ran}}, and the end of profiling.

        `step_ms` then holds {part of the graph: milliseconds} of a run on the smallest number of tokens: the median of
        several, without the first.

        Args:
            run: runs the graph on so many tokens, and says in how many calls.
        """
        calls = [run(tokens) for tokens in [*[min(counts)] * WARM, *counts]]
        ran: list[Counter[str]] = [Counter()]
        took: list[Counter[str]] = [Counter()]
        for event in json.loads(Path(self.session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                operator = event["args"]["op_name"]
                ran[-1][f"{operator} ({event['args']['provider']})"] += 1
                took[-1][part_of(event["name"], operator)] += event["dur"]
            elif event["name"] == "model_run":  # stands after the operators of its run
                ran.append(Counter())
                took.append(Counter())
        self._records.cleanup()
        steps = _joined(took[:-1], calls)[1:WARM]
        self.step_ms = {part: median(step[part] for step in steps) / 1000 for part in steps[-1]}
        last = _joined(ran[:-1], calls)[WARM:]
        return {tokens: dict(run.most_common()) for tokens, run in zip(counts, last, strict=True)}


def _joined(counters: Sequence[Counter[str]], calls: Sequence[int]) -> list[Counter[str]]:
    """One counter for as many calls of a graph as each entry of `calls` says."""
    assert len(counters) == sum(calls)
    left = iter(counters)
    return [sum(islice(left, number), Counter()) for number in calls]


def part_of(node: str, operator: str) -> Part:
    """What of a decode step an operator belongs to, by the name of its node."""
    if "lm_head" in node:
        return "head"
    if operator in PACKED:
        return "packed products"
    if operator.startswith(("MatMul", "Gemm", "DenseLinear", "FusedMatMul")):
        return "dense products"
    return "attention" if "Attention" in operator or "Softmax" in operator else "rest"


def kernels_of(profiles: dict[int, dict[str, int]], tokens: int) -> dict[str, int]:
    """The profile of the largest recorded number of tokens that is not above; the graph is the same for all."""
    assert profiles, "the runtime must be loaded with `profile`"
    return profiles[max((n for n in profiles if n <= tokens), default=min(profiles))]


def other_interface(model: str, what: str) -> ModelError:
    """The error of a graph that is no export of this program."""
    return ModelError(
        f"{model!r}: model.onnx is no export of this program: {what}; make it again with "
        "`gblm-compress export MODEL -o OUT --format onnx`"
    )


def _register_operators(options: Any) -> None:
    """Raises:
    MissingDependencyError: this package's operators were not compiled, or the installed ONNX Runtime refuses them.
    """
    import onnxruntime

    library = cpu.onnxruntime_library()
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime raises its own kinds, which share no base
        raise MissingDependencyError(
            f"ONNX Runtime {onnxruntime.__version__} does not take the operators of gblm-compress "
            f"({str(error)[:300]}); install a newer one, or export without --kernels"
        ) from error
