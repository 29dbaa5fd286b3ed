"""Zero-shot tasks through lm-eval (`pip install 'gblm-compress[eval]'`), and the share of the dense model's accuracy.

No other module knows lm-eval.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gblm_compress import errors
from gblm_compress.errors import DataError, MissingDependencyError, UsageError
from gblm_compress.models.files import sha256_of
from gblm_compress.printing import silenced
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from gblm_compress.tasks.metrics import mean, mean_metric, variance_of_mean

# A task's accuracy is the first that it has; acc_norm is by length-normalised likelihood.
METRICS = ("acc_norm", "acc")
TWO_SIDED_95 = 1.96
BATCH = 8  # Choices that the model answers at a time.

Answers = dict[str, tuple[str, list[float]]]  # {task: (metric, 1.0 or 0.0 for every question)}


@dataclass(frozen=True)
class Ratio:
    """An accuracy over the dense model's on the same questions, and its 95 % confidence interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskResult:
    """The standard error is None for a single question."""

    task: str
    metric: str
    accuracy: float
    error: float | None
    questions: int
    dense_accuracy: float | None = None
    recovery: Ratio | None = None


@dataclass(frozen=True)
class ZeroShot:
    """All tasks, and the recovery of their mean accuracy; None without a dense model."""

    tasks: tuple[TaskResult, ...]
    mean_accuracy: float
    recovery: Ratio | None = None


def check_folder(include_path: str | None) -> None:
    if include_path is not None and not os.path.isdir(include_path):
        raise UsageError(f"include_path {include_path!r}: no such folder; give one with lm-eval task files (.yaml)")


def fingerprint(settings: EvaluateSettings) -> list[Any]:
    """The version of lm-eval and a hash of every file in the user's folder: task files include others."""
    if not settings.tasks:
        return []
    include_path, hashes = settings.include_path, {}
    try:
        for path in sorted(Path(include_path).rglob("*")) if include_path is not None else []:
            if path.is_file() and path.parent.name != "__pycache__":
                hashes[str(path)] = sha256_of(path)
    except OSError as error:
        raise DataError(
            f"include_path {include_path!r}: {error.filename!r} cannot be read ({error.strerror}); make it readable, "
            "or move it out of the folder"
        ) from error
    return [version("lm_eval"), hashes]


def task_manager(settings: EvaluateSettings, progress: Progress) -> Any:
    """lm-eval's TaskManager, which must know all tasks or groups of these names."""
    tasks, include_path = settings.tasks, settings.include_path
    try:
        import lm_eval
    except ImportError as error:
        raise MissingDependencyError(
            "zero-shot tasks are measured by lm-eval, which is not installed; pip install 'gblm-compress[eval]'"
        ) from error
    check_folder(include_path)
    with _calm(progress):
        from lm_eval.tasks import TaskManager

        # lm-eval's own thousands of task files take seconds to list, and the user's folder is often enough.
        manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UsageError(
            f"task {unknown[0]!r} is not known to lm-eval {lm_eval.__version__}; "
            "`lm-eval ls tasks` lists its own, --include-path adds a folder of yours"
        )
    return manager


def answers(model: Any, tokenizer: Any, settings: EvaluateSettings, progress: Progress) -> Answers:
    """Ask a transformers causal language model the first `limit` questions of each task."""
    manager, tasks = task_manager(settings, progress), list(settings.tasks)
    with _calm(progress):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with errors.translated(
            lambda said: DataError(
                f"tasks {', '.join(tasks)}: cannot be read ({said}); without the hub, give task files that point at "
                "local data with --include-path"
            )
        ):
            loaded = manager.load(tasks)["tasks"]
        result: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
            tasks=list(loaded.values()),
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
    found = {}
    for task in loaded:
        questions = result["samples"].get(task)
        if not questions:
            raise DataError(f"task {task!r} has no questions; give a task that does")
        metric = next((metric for metric in METRICS if metric in questions[0]), None)
        if metric is None:
            raise UsageError(f"task {task!r} has no accuracy ({' or '.join(METRICS)}); give a task that does")
        found[task] = (metric, [float(question[metric]) for question in questions])
    return found


def score(answered: Answers, dense: Answers | None = None) -> ZeroShot:
    results = []
    for task, (metric, correct) in answered.items():
        accuracy = mean_metric(correct)
        beside = (mean(dense[task][1]), recovery([correct], [dense[task][1]])) if dense else ()
        results.append(TaskResult(task, metric, accuracy.value, accuracy.error, len(correct), *beside))
    of_all = recovery([own for _, own in answered.values()], [dense[task][1] for task in answered]) if dense else None
    return ZeroShot(tuple(results), mean([result.accuracy for result in results]), of_all)


def recovery(model: list[list[float]], dense: list[list[float]]) -> Ratio | None:
    """The ratio of two mean accuracies over tasks, with a 95 % confidence interval; tasks count alike.

    The models answer the same questions. So the interval comes from the spread of x − r·y over the questions of each
    task (delta method for the ratio r of paired means). None without a right dense answer, or with a single question.
    """
    mean_model, mean_dense = mean([mean(x) for x in model]), mean([mean(y) for y in dense])
    if mean_dense == 0 or any(len(x) < 2 for x in model):
        return None
    ratio = mean_model / mean_dense
    variance = sum(
        variance_of_mean([a - ratio * b for a, b in zip(x, y, strict=True)]) for x, y in zip(model, dense, strict=True)
    )
    half = TWO_SIDED_95 * math.sqrt(variance) / len(model) / mean_dense
    return Ratio(ratio, ratio - half, ratio + half)


@contextmanager
def _calm(progress: Progress) -> Iterator[None]:
    """Silence lm-eval, and with `quiet` its progress bars too."""
    with silenced(), redirect_stderr(io.StringIO()) if progress.quiet else nullcontext():
        yield
