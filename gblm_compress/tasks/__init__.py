"""What a model is for.

The registry of tasks, a file for each, and the samples that they read. Importing a module loads no torch.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gblm_compress import errors
from gblm_compress.errors import DataError, ModelError
from gblm_compress.storage.paths import kind_of, local
from gblm_compress.tasks.causal_lm import CausalLM
from gblm_compress.tasks.classification import Classification
from gblm_compress.tasks.embedding import Embedding
from gblm_compress.tasks.image_classification import ImageClassification
from gblm_compress.tasks.task import Task
from gblm_compress.tasks.text import FOUND

TASKS: dict[str, Task] = {
    "causal-lm": CausalLM(),
    "embedding": Embedding(),
    "classification": Classification(),
    "image-classification": ImageClassification(),
}
"""All tasks."""

DEFAULT = "causal-lm"
"""That of a model of which nothing tells the task."""


def data_files(dataset: str) -> list[Path]:
    """As `Task.data_files`, of a model that is not known yet: what the first task that can read the dataset says.

    Raises:
        DataError: no task can read it.
    """
    found: list[list[Path]] = []
    looks: list[Callable[[], object]] = [
        lambda task=task: found.append(task.data_files(dataset))  # type: ignore[misc]
        for task in TASKS.values()
    ]
    unreadable = errors.collect(looks)
    if found:
        return found[0]
    if len({str(fault) for fault in unreadable}) == 1:
        raise unreadable[0]
    if (kind := kind_of(local(dataset))) is None:
        raise DataError(f"dataset {dataset!r}: no such file")
    models: dict[str, list[str]] = {}
    for task in TASKS.values():
        models.setdefault(task.reads, []).append(task.help)
    needed = "; ".join(f"for {' or '.join(names)} give {reads}" for reads, names in models.items())
    raise DataError(f"dataset {dataset!r} {FOUND[kind]}; {needed}")


def files_of(*datasets: str) -> list[Path]:
    """The files of some datasets, which no output may replace; of one that cannot be read there are none, and it is
    refused with all that is at fault."""
    found: list[Path] = []
    for dataset in datasets:
        with suppress(DataError):
            found += data_files(dataset)
    return found


def is_here(dataset: str) -> bool:
    """Whether a dataset is read from this machine rather than from the hub."""
    return dataset == "demo" or bool(data_files(dataset))


def task_of(model_class: type) -> Task:
    """The task that a class of models is for, as optimum's TasksManager knows it of the class or one above it.

    A class from outside transformers that it does not know is for `DEFAULT`. A language model that reads images or
    sound too is a language model: its other parts stay as they are.

    Raises:
        ModelError: it is for a task that is not in `TASKS`, or a class of transformers for none.
    """
    from optimum.exporters.tasks import TasksManager

    name = "no task that optimum knows"
    for kind in model_class.__mro__:
        try:
            name = TasksManager.infer_task_from_model(kind)
            break
        except ValueError:  # the name fits none of its tasks
            if task := _loaded_as(kind):
                return task
    else:
        if not model_class.__module__.startswith("transformers."):
            return TASKS[DEFAULT]
    found = next((task for task in TASKS.values() if task.optimum == name), None)
    if found is None and name.endswith("to-text") and model_class.__name__ in _causal_lms():
        found = TASKS["causal-lm"]
    if found is None:
        needed = " or ".join(task.help for task in TASKS.values())
        raise ModelError(f"{model_class.__name__} is for {name}; {needed} is needed")
    return found


def _loaded_as(kind: type) -> Task | None:
    """The task for which transformers loads the class, if any; optimum misses those that share a config (DeiT's)."""
    import transformers

    for task in TASKS.values():
        names = getattr(transformers, task.auto_class)._model_mapping._model_mapping.values()
        if any(kind.__name__ in (name if isinstance(name, tuple) else (name,)) for name in names):
            return task
    return None


def _causal_lms() -> set[str]:
    """The classes that transformers loads as causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
