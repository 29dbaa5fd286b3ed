"""The registry of tasks. Importing a module of this folder loads no torch."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gblm_compress.errors import DataError, ModelError
from gblm_compress.settings.fields import SELF, mixed, weighted
from gblm_compress.tasks.causal_lm import CausalLM
from gblm_compress.tasks.classification import Classification
from gblm_compress.tasks.embedding import Embedding
from gblm_compress.tasks.image_classification import ImageClassification
from gblm_compress.tasks.task import Task
from gblm_compress.tasks.text import found

TASKS: dict[str, Task] = {
    "causal-lm": CausalLM(),
    "embedding": Embedding(),
    "classification": Classification(),
    "image-classification": ImageClassification(),
}

DEFAULT = "causal-lm"  # for a model of unknown class


def data_files(dataset: str) -> list[Path]:
    """As `Task.data_files`, before the model is known: the first task that reads the dataset answers."""
    refused: dict[str, DataError] = {}
    for task in TASKS.values():
        try:
            return task.data_files(dataset)
        except DataError as error:
            refused[str(error)] = error
    if len(refused) == 1:
        raise next(iter(refused.values()))
    path = Path(os.path.expanduser(dataset))
    if not os.path.exists(path):
        raise DataError(f"dataset {dataset!r}: no such file")
    models: dict[str, list[str]] = {}
    for task in TASKS.values():
        models.setdefault(task.reads, []).append(task.help)
    needed = "; ".join(f"for {' or '.join(names)} give {reads}" for reads, names in models.items())
    raise DataError(f"dataset {dataset!r} {found(path)}; {needed}")


def files_of(*datasets: str) -> list[Path]:
    """The files of datasets, which no output may replace. Unreadable datasets are skipped here, and refused later."""
    found: list[Path] = []
    for dataset in datasets:
        with suppress(DataError):
            found += data_files(dataset)
    return found


def is_here(dataset: str) -> bool:
    """Whether a dataset is read from this machine rather than from the hub."""
    return dataset in ("demo", SELF) or bool(data_files(dataset))


def same_text(evaluated: str, calibrated: str) -> str:
    """A note if an evaluation reads a dataset of the calibration, even another part of it; else empty."""
    read = [weighted(part)["dataset"] for part in mixed(calibrated)]
    files, others = ([[path.resolve() for path in files_of(name)] for name in names] for names in ((evaluated,), read))
    same = evaluated in read or (files[0] and files[0] in others)
    return "same data as calibration: on other data the loss may be larger" if same else ""


def task_of(model_class: type) -> Task:
    """The task that optimum's TasksManager infers for a model class or a base class of it; ModelError if none.

    An unknown class from outside transformers gets `DEFAULT`. A language model that also reads images or sound counts
    as a causal language model; its other parts stay as they are.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    infer, name = TasksManager.infer_task_from_model, "no task that optimum knows"
    for kind in model_class.__mro__:
        try:
            name = infer(kind)
            inferred = {infer(getattr(transformers, task.auto_class)): task for task in TASKS.values()}
            if found := inferred.get(name) or (name.endswith("to-text") and _loaded_as(kind, [TASKS["causal-lm"]])):
                return found
            break
        except ValueError:  # not in optimum's lists, which miss the classes that share a config, as DeiT's do
            if found := _loaded_as(kind, TASKS.values()):
                return found
    else:
        if not model_class.__module__.startswith("transformers."):
            return TASKS[DEFAULT]
    needed = " or ".join(task.help for task in TASKS.values())
    raise ModelError(f"{model_class.__name__} is for {name}; {needed} is needed")


def _loaded_as(kind: type, tasks: Iterable[Task]) -> Task | None:
    import transformers

    for task in tasks:
        for names in getattr(transformers, task.auto_class)._model_mapping._model_mapping.values():
            if kind.__name__ in (names if isinstance(names, tuple) else (names,)):
                return task
    return None
