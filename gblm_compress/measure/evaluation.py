"""The evaluation stage: the metrics of a task, such as perplexity, and fidelity to the dense model.

Perplexity follows the protocol of the GPTQ, SparseGPT, Wanda and GBLM papers: the text is joined, tokenized
whole and cut into non-overlapping windows. Each window predicts its tokens 2 … L from those before them.
"""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gblm_compress import errors, tasks
from gblm_compress.errors import GblmError, ModelError, UsageError
from gblm_compress.machine import cost
from gblm_compress.measure import zero_shot
from gblm_compress.measure.runtimes import load_runtime
from gblm_compress.measure.zero_shot import Answers, ZeroShot
from gblm_compress.models import loading
from gblm_compress.models.manifest import check_baseline, read_if_ours
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from gblm_compress.storage import outputs
from gblm_compress.tasks.metrics import Metric, mean
from gblm_compress.tasks.task import Sample, fingerprint

LOGIT_BYTES = 24  # of a prediction: the logits of both models, and their log-probabilities
MOST_KEPT = 16 << 30  # Largest number of bytes of kept logits; memory seldom caches more, and disks are slow.


@dataclass(frozen=True)
class EvaluateResult:
    model: str
    dataset: str
    metrics: dict[str, Metric]  # the first is the most important
    windows: int  # samples
    sequence_length: int
    dtype: str
    provider: str
    sample: str = "window"  # the task's word for a sample
    baseline: dict[str, Metric] | None = None  # metrics of the dense model
    fidelity: dict[str, float] | None = None  # means over the samples of `Task.fidelity`, and `Task.agreement`
    zero_shot: ZeroShot | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: a metric as NAME, NAME_error and baseline_NAME, `metrics` the list of names."""
        plain = asdict(self)
        baseline = plain.pop("baseline") or {}
        for name, metric in plain["metrics"].items():
            plain[name], plain[f"{name}_error"] = metric["value"], metric["error"]
            plain[f"baseline_{name}"] = baseline[name]["value"] if baseline else None
        return {**plain, "metrics": list(plain["metrics"])}


class Reference:
    """A model that answers several evaluations, each question once.

    Logits are kept in float32 in an unnamed file in `folder` (None keeps none), which the system removes with the
    process. Without room, they are computed again.
    """

    def __init__(
        self, source: ModelSource, *, dtype: str = "auto", device: str = "auto", folder: Path | None = None
    ) -> None:
        self.source = source
        self._dtype, self._device, self._folder = dtype, device, folder
        self._runtime: Any = None
        self._file: IO[bytes] | None = None
        self._left = 0
        self._kept: dict[str, int] = {}  # {sample: place in the file}
        self._answers: dict[tuple[Any, ...], Answers] = {}

    def judged(self, sample: Sample, progress: Progress) -> Tensor:
        """`Task.judged` of the prediction: [positions, …] in float32."""
        key = "" if self._folder is None else fingerprint([sample])
        if self._file is not None and key in self._kept:
            self._file.seek(self._kept[key])
            return torch.from_numpy(np.load(self._file))
        judged = loading.task_of(self.source).judged(self.loaded(progress).predict(sample), sample).contiguous()
        if self._folder is not None:
            self._keep(key, judged, self._folder)
        return judged

    def answers(self, settings: EvaluateSettings, progress: Progress) -> Answers:
        asked = settings.tasks, settings.limit, settings.include_path
        if asked not in self._answers:
            model = self.loaded(progress).model
            progress.say(f"asking {self.source.name} …")
            tokenizer = loading.load_processor(self.source)
            self._answers[asked] = zero_shot.answers(model, tokenizer, settings, progress)
        return self._answers[asked]

    def unload(self) -> None:
        """Free the model's memory; its answers stay."""
        self._runtime = None

    def close(self) -> None:
        self.unload()
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def loaded(self, progress: Progress) -> Any:
        if self._runtime is None:
            progress.say(f"loading {self.source.name} …")
            device = loading.choose_device(self._device)
            dtype = loading.choose_dtype(self._dtype, self.source, device)
            self._runtime = load_runtime(self.source, dtype, device, torch.get_num_threads())
        return self._runtime

    def _keep(self, key: str, logits: Tensor, folder: Path) -> None:
        if self._file is None:
            self._left = min(MOST_KEPT, outputs.free_bytes(folder) // 2)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - `close` closes it
        if logits.nbytes > self._left:
            return
        try:
            place = self._file.seek(0, os.SEEK_END)
            np.save(self._file, logits.numpy())
        except OSError:  # others filled the disk meanwhile
            self._left = 0
            return
        self._left -= logits.nbytes
        self._kept[key] = place


def samples_of(source: ModelSource, settings: EvaluateSettings, progress: Progress) -> Sequence[Sample]:
    if settings.max_windows == 0:
        return []
    progress.say(f"reading {settings.dataset} …")
    processor, config = loading.load_processor(source), loading.config_of(source)
    size = settings.sequence_length, settings.max_windows
    return loading.task_of(source).evaluation(processor, config, settings.dataset, *size)


def check(models: list[ModelSource], settings: EvaluateSettings, progress: Progress) -> list[GblmError]:
    looks: list[Callable[[], object]] = [
        lambda: (loading.task_of(models[0]) if models else tasks).data_files(settings.dataset)
    ]
    if settings.tasks:
        looks.append(partial(zero_shot.task_manager, settings, progress))
    return errors.collect([*looks, *(partial(_check_model, model, settings) for model in models)])


def evaluate(
    source: ModelSource,
    settings: EvaluateSettings,
    *,
    baseline: ModelSource | Reference | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress,
) -> EvaluateResult:
    """Measure how well a model does its task, and its fidelity to `baseline` on the same samples.

    A `Reference` serves several evaluations. With 0 for `max_windows`, only the tasks are measured.
    """
    reference = Reference(baseline, dtype=dtype, device=device) if isinstance(baseline, ModelSource) else baseline
    dense = [] if reference is None else [reference.source]
    looks: list[Callable[[], object]] = [partial(loading.choose_device, device)]
    looks += [partial(check_baseline, source, model) for model in dense]
    errors.raise_all(check([source, *dense], settings, progress) + errors.collect(looks))
    task, samples = loading.task_of(source), samples_of(source, settings, progress)
    if not progress.quiet and not isinstance(baseline, Reference):  # several evaluations share it
        place = loading.choose_device(device)
        if line := _estimate([source, *dense], samples, loading.choose_dtype(dtype, source, place), place):
            progress.say(line)
    own = Reference(source, dtype=dtype, device=device)
    runtime = own.loaded(progress)
    measured, of_dense, likenesses = [], [], []
    for sample in progress.track(samples, "evaluating", unit=f"{task.sample}s"):
        judged = own.judged(sample, progress)
        measured.append(task.measure(judged, sample))
        if reference is not None:
            dense_judged = reference.judged(sample, progress)
            of_dense.append(task.measure(dense_judged, sample))
            likenesses.append(task.fidelity(dense_judged, judged))
    metrics = task.metrics(measured) if measured else {}
    if metrics and not any(math.isfinite(metric.value) for metric in metrics.values()):
        values = " and ".join(f"{name} is {metric.value}" for name, metric in metrics.items())
        raise ModelError(f"{source.name!r}: its {values}; the model produces NaN or infinite predictions")
    answers = None
    if settings.tasks:
        expected = reference.answers(settings, progress) if reference else None
        answers = zero_shot.score(own.answers(settings, progress), expected)
    fidelity = None
    if reference is not None:
        if likenesses:
            fidelity = {name: mean([one[name] for one in likenesses]) for name in likenesses[0]}
            fidelity |= task.agreement(of_dense, measured)
        reference.unload()
    return EvaluateResult(
        model=source.name,
        dataset=settings.dataset,
        metrics=metrics,
        windows=len(samples),
        sequence_length=settings.sequence_length,
        dtype=runtime.dtype,
        provider=runtime.provider,
        sample=task.sample,
        baseline=task.metrics(of_dense) if of_dense else None,
        fidelity=fidelity,
        zero_shot=answers,
        note=tasks.same_text(
            settings.dataset, (read_if_ours(source.folder).get("calibration") or {}).get("dataset", "")
        ),
    )


def _estimate(models: list[ModelSource], samples: Sequence[Sample], dtype: str, device: str) -> str | None:
    """Time and memory of an evaluation on text; None without a folder whose weights can be counted."""
    folders = [model for model in models if not model.is_export]
    if not folders or not samples or "input_ids" not in samples[0]:
        return None
    weights, kind, task = loading.count_weights(folders[0]), getattr(torch, dtype), loading.task_of(folders[0])
    lengths = [sample["input_ids"].numel() for sample in samples]
    seconds = 2 * weights * sum(lengths) * len(models) / cost.operations_per_second(device, kind)
    held = [2 * model.bytes_on_disk if model.is_export else weights * kind.itemsize for model in models]
    logits = LOGIT_BYTES * task.judged_values(loading.config_of(folders[0]), max(lengths))
    return cost.sentence(seconds, sum(held) + logits)


def _check_model(source: ModelSource, settings: EvaluateSettings) -> None:
    if settings.tasks and source.is_onnx:
        raise ModelError(f"model {source.name!r}: tasks are measured in torch; give the folder it was exported from")
    if settings.tasks and not (task := loading.task_of(source)).generates:
        raise UsageError(f"model {source.name!r} is {task.help}; tasks of lm-eval are for causal language models")
    if settings.max_windows != 0:
        loading.check_length(source, settings.sequence_length)
