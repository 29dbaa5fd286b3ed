"""The evaluation stage: perplexity, and fidelity to the dense model.

Perplexity follows the protocol of the GPTQ, SparseGPT, Wanda and GBLM papers: the text is joined, tokenized
whole and cut into non-overlapping windows; each window predicts its tokens 2 … L from those before them.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from gblm_compress import faults
from gblm_compress.errors import GblmError, ModelError
from gblm_compress.measure import zero_shot
from gblm_compress.measure.reference import Reference, ask
from gblm_compress.measure.runtimes import load_runtime
from gblm_compress.measure.zero_shot import ZeroShot
from gblm_compress.models import loading
from gblm_compress.models.baseline import check_baseline
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from gblm_compress.tasks import text
from gblm_compress.tasks.task import Sample


@dataclass(frozen=True)
class Fidelity:
    """How close a model stays to the dense one, over the same predicted tokens.

    Attributes:
        mean_kl: mean of KL(dense ‖ model) over tokens, in nats.
        top1_agreement: fraction of tokens with the same most probable prediction.
    """

    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class EvaluateResult:
    """The outcome of the stage.

    Attributes:
        perplexity: exp of the mean cross-entropy over all predicted tokens.
        perplexity_error: its standard error, from the spread of the windows' means (delta method); None for
            a single window.
        cross_entropy: the mean itself, in nats per token.
        windows, predicted_tokens: how much text it stands on.
        baseline_perplexity: that of the dense model, when there is one.
        zero_shot: accuracies on tasks, when any were asked for.
    """

    model: str
    dataset: str
    perplexity: float
    perplexity_error: float | None
    cross_entropy: float
    windows: int
    predicted_tokens: int
    sequence_length: int
    dtype: str
    provider: str
    baseline_perplexity: float | None = None
    fidelity: Fidelity | None = None
    zero_shot: ZeroShot | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def prepare(source: ModelSource, settings: EvaluateSettings, progress: Progress) -> list[Sample]:
    """What an evaluation reads, so that its absence shows before any work: the samples.

    Raises:
        GblmError: the text cannot be read or is too short, a task is not known, or the model cannot take them.
    """
    faults.raise_all(check([source], settings, progress))
    return _samples(source, settings, progress)


def _samples(source: ModelSource, settings: EvaluateSettings, progress: Progress) -> list[Sample]:
    progress.say(f"reading {settings.dataset} …")
    tokenizer, config = loading.load_tokenizer(source), loading.config_of(source)
    size = settings.sequence_length, settings.max_windows
    return loading.task_of(source).evaluation(tokenizer, config, settings.dataset, *size)


def check(models: list[ModelSource], settings: EvaluateSettings, progress: Progress) -> list[GblmError]:
    """The faults of an evaluation that show before it: of its tasks, of a text that is a file here, of the models."""
    looks: list[Callable[[], object]] = [partial(text.check_source, settings.dataset)]
    if settings.tasks:
        looks.append(partial(zero_shot.task_manager, settings.tasks, settings.include_path, progress))
    return faults.collect([*looks, *(partial(_check_model, model, settings) for model in models)])


def evaluate(
    source: ModelSource,
    settings: EvaluateSettings,
    *,
    baseline: ModelSource | Reference | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress,
) -> EvaluateResult:
    """Measure the perplexity of a model, and its fidelity to `baseline` on the same windows.

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
    faults.raise_all(check(given, settings, progress) + faults.collect(looks))
    task, samples = loading.task_of(source), _samples(source, settings, progress)
    device = loading.choose_device(device)
    progress.say(f"loading {source.name} …")
    model = load_runtime(source, loading.choose_dtype(dtype, source, device), device, torch.get_num_threads())
    losses, dense_losses, divergences, agreements, predicted = [], [], [], [], 0
    for sample in progress.track(samples, "evaluating", unit="windows"):
        judged = task.judged(model.predict(sample), sample)
        losses.append(float(task.loss(judged, sample)))
        predicted += len(judged)
        if reference is not None:
            dense = reference.judged(sample, progress)
            dense_losses.append(float(task.loss(dense, sample)))
            divergences.append(mean_kl(dense, judged))
            agreements.append(top1_agreement(dense, judged))
    mean, error = mean_and_standard_error(losses)
    if not math.isfinite(mean):
        raise ModelError(f"{source.name!r}: its cross-entropy is {mean}; the model produces NaN or infinite logits")
    tasks = None
    if settings.tasks:
        answered = ask(source, model, settings, progress)
        tasks = zero_shot.score(answered, reference.answers(settings, progress) if reference else None)
    if reference is not None:
        reference.unload()
    return EvaluateResult(
        model=source.name,
        dataset=settings.dataset,
        perplexity=_exp(mean),
        perplexity_error=None if error is None else _exp(mean) * error,
        cross_entropy=mean,
        windows=len(samples),
        predicted_tokens=predicted,
        sequence_length=settings.sequence_length,
        dtype=model.dtype,
        provider=model.provider,
        baseline_perplexity=_exp(sum(dense_losses) / len(dense_losses)) if dense_losses else None,
        fidelity=Fidelity(zero_shot.mean(divergences), zero_shot.mean(agreements)) if reference else None,
        zero_shot=tasks,
    )


def _check_model(source: ModelSource, settings: EvaluateSettings) -> None:
    if settings.tasks and source.is_onnx:
        raise ModelError(f"model {source.name!r}: tasks are measured in torch; give the folder it was exported from")
    loading.check_length(source, settings.sequence_length)


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Mean over tokens of KL(softmax(reference) ‖ softmax(logits)) in nats; both [tokens, vocabulary]."""
    return float(kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True))


def top1_agreement(reference: Tensor, logits: Tensor) -> float:
    """Fraction of tokens whose most probable prediction is the same; both [tokens, vocabulary]."""
    return float((reference.argmax(-1) == logits.argmax(-1)).double().mean())


def mean_and_standard_error(values: list[float]) -> tuple[float, float | None]:
    """The mean, and the standard error of the mean (None for one value)."""
    error = math.sqrt(zero_shot.variance_of_mean(values)) if len(values) > 1 else None
    return zero_shot.mean(values), error


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
