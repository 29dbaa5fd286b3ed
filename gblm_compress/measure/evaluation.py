"""The evaluation stage: the metrics of a task, such as perplexity, and fidelity to the dense model.

Perplexity follows the protocol of the GPTQ, SparseGPT, Wanda and GBLM papers: the text is joined, tokenized
whole and cut into non-overlapping windows; each window predicts its tokens 2 … L from those before them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gblm_compress import errors, tasks
from gblm_compress.errors import GblmError, ModelError, UsageError
from gblm_compress.measure import zero_shot
from gblm_compress.measure.reference import Reference, ask
from gblm_compress.measure.runtimes import load_runtime
from gblm_compress.measure.zero_shot import ZeroShot
from gblm_compress.models import loading
from gblm_compress.models.baseline import check_baseline
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from gblm_compress.tasks.metrics import Metric, mean
from gblm_compress.tasks.task import Sample


@dataclass(frozen=True)
class EvaluateResult:
    """The outcome of the stage.

    Attributes:
        metrics: how well the task is done, the metric that counts first: see `Task.metrics`.
        windows, predicted_tokens: how many samples and predictions it stands on.
        sample: what a sample is called.
        baseline: the metrics of the dense model, when there is one.
        fidelity: how close the predictions stay to the dense model's: means over the samples of `Task.fidelity`, and
            `Task.agreement`.
        zero_shot: accuracies on tasks, when any were asked for.
    """

    model: str
    dataset: str
    metrics: dict[str, Metric]
    windows: int
    predicted_tokens: int
    sequence_length: int
    dtype: str
    provider: str
    sample: str = "window"
    baseline: dict[str, Metric] | None = None
    fidelity: dict[str, float] | None = None
    zero_shot: ZeroShot | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: a metric as NAME, NAME_error and baseline_NAME, `metrics` the list of names."""
        plain = asdict(self)
        baseline = plain.pop("baseline") or {}
        for name, metric in plain["metrics"].items():
            plain[name], plain[f"{name}_error"] = metric["value"], metric["error"]
            plain[f"baseline_{name}"] = baseline[name]["value"] if baseline else None
        return {**plain, "metrics": list(plain["metrics"])}


def prepare(source: ModelSource, settings: EvaluateSettings, progress: Progress) -> Sequence[Sample]:
    """What an evaluation reads, so that its absence shows before any work: the samples.

    Raises:
        GblmError: the text cannot be read or is too short, a task is not known, or the model cannot take them.
    """
    errors.raise_all(check([source], settings, progress))
    return _samples(source, settings, progress)


def _samples(source: ModelSource, settings: EvaluateSettings, progress: Progress) -> Sequence[Sample]:
    progress.say(f"reading {settings.dataset} …")
    processor, config = loading.load_processor(source), loading.config_of(source)
    size = settings.sequence_length, settings.max_windows
    return loading.task_of(source).evaluation(processor, config, settings.dataset, *size)


def check(models: list[ModelSource], settings: EvaluateSettings, progress: Progress) -> list[GblmError]:
    """The faults of an evaluation that show before it: of its tasks, of a text that is a file here, of the models."""
    looks: list[Callable[[], object]] = [
        lambda: (loading.task_of(models[0]) if models else tasks).data_files(settings.dataset)
    ]
    if settings.tasks:
        looks.append(partial(zero_shot.task_manager, settings.tasks, settings.include_path, progress))
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
    """Measure how well a model does its task, and its fidelity to `baseline` on the same windows.

    Args:
        source: a Hugging Face folder (run in torch) or an ONNX export (run in ONNX Runtime).
        baseline: the dense model; a `Reference` to it computes once what several evaluations need.

    Raises:
        GblmError: as `prepare`; the device is absent, or the baseline is another model.
    """
    reference = Reference(baseline, dtype=dtype, device=device) if isinstance(baseline, ModelSource) else baseline
    given = [source] if reference is None else [source, reference.source]
    looks: list[Callable[[], object]] = [partial(loading.choose_device, device)]
    if reference is not None:
        looks.append(partial(check_baseline, source, reference.source))
    errors.raise_all(check(given, settings, progress) + errors.collect(looks))
    task, samples = loading.task_of(source), _samples(source, settings, progress)
    device = loading.choose_device(device)
    progress.say(f"loading {source.name} …")
    model = load_runtime(source, loading.choose_dtype(dtype, source, device), device, torch.get_num_threads())
    measured, of_dense, likenesses, predicted = [], [], [], 0
    for sample in progress.track(samples, "evaluating", unit=f"{task.sample}s"):
        judged = task.judged(model.predict(sample), sample)
        measured.append(task.measure(judged, sample))
        predicted += len(judged)
        if reference is not None:
            dense = reference.judged(sample, progress)
            of_dense.append(task.measure(dense, sample))
            likenesses.append(task.fidelity(dense, judged))
    metrics = task.metrics(measured)
    if metrics and not any(math.isfinite(metric.value) for metric in metrics.values()):
        values = " and ".join(f"{name} is {metric.value}" for name, metric in metrics.items())
        raise ModelError(f"{source.name!r}: its {values}; the model produces NaN or infinite predictions")
    answers = None
    if settings.tasks:
        answered = ask(source, model, settings, progress)
        answers = zero_shot.score(answered, reference.answers(settings, progress) if reference else None)
    fidelity = None
    if reference is not None:
        fidelity = {name: mean([one[name] for one in likenesses]) for name in likenesses[0]}
        fidelity |= task.agreement(of_dense, measured)
        reference.unload()
    return EvaluateResult(
        model=source.name,
        dataset=settings.dataset,
        metrics=metrics,
        windows=len(samples),
        predicted_tokens=predicted,
        sequence_length=settings.sequence_length,
        dtype=model.dtype,
        provider=model.provider,
        sample=task.sample,
        baseline=task.metrics(of_dense) if reference else None,
        fidelity=fidelity,
        zero_shot=answers,
    )


def _check_model(source: ModelSource, settings: EvaluateSettings) -> None:
    if settings.tasks and source.is_onnx:
        raise ModelError(f"model {source.name!r}: tasks are measured in torch; give the folder it was exported from")
    if settings.tasks and not (task := loading.task_of(source)).generates:
        raise UsageError(f"model {source.name!r} is {task.help}; tasks of lm-eval are for causal language models")
    loading.check_length(source, settings.sequence_length)
