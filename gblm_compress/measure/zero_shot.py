"""Zero-shot tasks through lm-eval, and how much of the dense model's accuracy is left.

lm-eval is an optional dependency (`pip install 'gblm-compress[eval]'`); this is the only module that knows it.
"""

import hashlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gblm_compress.errors import (
    DataError,
    MissingDependencyError,
    NotEnoughMemoryError,
    UsageError,
    first_line,
    is_out_of_memory,
)
from gblm_compress.progress import Progress
from gblm_compress.storage.paths import kind_of
from gblm_compress.tasks.metrics import mean, mean_metric, variance_of_mean

METRICS = ("acc_norm", "acc")
"""What counts as a task's accuracy, the first that it has: by length-normalised likelihood where the task offers it."""

TWO_SIDED_95 = 1.96


@dataclass(frozen=True)
class Ratio:
    """An accuracy over the dense model's on the same questions, and its 95 % confidence interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        metric: acc_norm or acc.
        accuracy: fraction of the questions.
        error: its standard error; None for a single question.
        questions: how many.
        dense_accuracy, recovery: of the dense model and over it, where there is one.
    """

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


BATCH = 8
"""Questions' choices that the model answers at a time."""


def check_folder(include_path: str | None) -> None:
    """Refuse at once a folder of task files that is none.

    Raises:
        UsageError: there is no such folder.
    """
    if include_path is not None and kind_of(Path(include_path)) != "folder":
        raise UsageError(f"include_path {include_path!r}: no such folder; give one with lm-eval task files (.yaml)")


def fingerprint(tasks: Sequence[str], include_path: str | None) -> list[Any]:
    """What of tasks decides their outcome beside their names: lm-eval, and every file of the user's folder, for a task
    file takes in others and data beside it.

    Raises:
        DataError: a file cannot be read.
    """
    if not tasks:
        return []
    hashes = {}
    try:
        for path in sorted(Path(include_path).rglob("*")) if include_path is not None else []:
            if path.is_file() and path.parent.name != "__pycache__":  # which comes of a task's Python functions
                with path.open("rb") as file:
                    hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"include_path {include_path!r}: {error.filename!r} cannot be read ({error.strerror}); make it readable, "
            "or move it out of the folder"
        ) from error
    return [version("lm_eval"), hashes]


def task_manager(tasks: Sequence[str], include_path: str | None, progress: Progress) -> Any:
    """lm-eval's TaskManager, which knows all `tasks`.

    Args:
        tasks: names of lm-eval tasks or groups.
        include_path: folder with task files of the user's own.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UsageError: a task is not known, or there is no such folder.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise MissingDependencyError(
            "zero-shot tasks are measured by lm-eval, which is not installed; pip install 'gblm-compress[eval]'"
        ) from error
    check_folder(include_path)
    with _calm(progress):
        from lm_eval.tasks import TaskManager

        # lm-eval's own thousands of task files take seconds to list; the user's folder often has all that is asked for.
        manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UsageError(
            f"task {unknown[0]!r} is not known to lm-eval {lm_eval.__version__}; "
            "`lm-eval ls tasks` lists its own, --include-path adds a folder of yours"
        )
    return manager


def answers(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None, include_path: str | None, progress: Progress
) -> dict[str, tuple[str, list[float]]]:
    """Ask a model all questions. Reading them and asking them fail in different ways, and are told apart.

    Args:
        model: a transformers causal language model.
        tasks, include_path: as for `task_manager`.
        limit: at most this many questions of each task, the first ones.

    Returns:
        {task: (metric, 1.0 or 0.0 for every question)}.

    Raises:
        GblmError: as `task_manager`.
        UsageError: a task has no accuracy.
        DataError: a task's data cannot be had.
        NotEnoughMemoryError: memory ran out.
    """
    manager = task_manager(tasks, include_path, progress)
    with _calm(progress):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _enough_memory():
            try:
                loaded = manager.load(list(tasks))["tasks"]
            except Exception as error:  # the hub client, the file readers and lm-eval each raise their own kinds
                if is_out_of_memory(error):
                    raise
                raise DataError(
                    f"tasks {', '.join(tasks)}: cannot be read ({first_line(error)}); without the hub, give task files "
                    "that point at local data with --include-path"
                ) from error
            result: Any = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
                tasks=list(loaded.values()),
                limit=limit,
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


def score(
    answered: dict[str, tuple[str, list[float]]], dense: dict[str, tuple[str, list[float]]] | None = None
) -> ZeroShot:
    """Accuracies with standard errors, and the recovery against the dense model's answers to the same questions."""
    results = []
    for task, (metric, correct) in answered.items():
        reference = dense[task][1] if dense is not None else None
        accuracy = mean_metric(correct)
        results.append(
            TaskResult(
                task=task,
                metric=metric,
                accuracy=accuracy.value,
                error=accuracy.error,
                questions=len(correct),
                dense_accuracy=None if reference is None else mean(reference),
                recovery=None if reference is None else recovery([correct], [reference]),
            )
        )
    mine = [correct for _, correct in answered.values()]
    theirs = [dense[task][1] for task in answered] if dense is not None else None
    return ZeroShot(
        tasks=tuple(results),
        mean_accuracy=mean([result.accuracy for result in results]),
        recovery=None if theirs is None else recovery(mine, theirs),
    )


def recovery(model: list[list[float]], dense: list[list[float]]) -> Ratio | None:
    """The ratio of two mean accuracies over tasks, with a 95 % confidence interval.

    The models answer the same questions, so that the interval comes from the spread of x − r·y over the questions
    (delta method for the ratio r of paired means), for each task, and tasks count alike.

    Args:
        model, dense: for every task, 1.0 or 0.0 for every question.

    Returns:
        None where the dense model has no right answer, or a task a single question.
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
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise NotEnoughMemoryError(
                f"memory ran out while tasks were asked, {BATCH} choices at a time ({first_line(error)}); fewer "
                "questions (--limit) need no less: give --dtype bfloat16, or --device cpu if it was the GPU's, or "
                "tasks with shorter questions"
            ) from error
        raise


@contextmanager
def _calm(progress: Progress) -> Iterator[None]:
    """Keep lm-eval's log lines and warnings to itself; its progress bars are shown unless quiet is asked for."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    quiet = redirect_stderr(io.StringIO()) if progress.quiet else nullcontext()
    try:
        with warnings.catch_warnings(), quiet, redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
