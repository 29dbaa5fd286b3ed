"""The Python API: each function is the command of its name, on a path, a hub id or a model in memory.

Settings are keywords, called as in recipes and described by `help`. Progress goes to stderr, in a terminal and a
notebook alike, unless `quiet=True`.
"""

import difflib
import hashlib
import inspect as signatures
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from gblm_compress import exporters, tasks
from gblm_compress.calibration import generation
from gblm_compress.calibration.generation import GenerateResult
from gblm_compress.errors import UsageError
from gblm_compress.exporters import ExportResult
from gblm_compress.measure import benchmarking, evaluation, inspection
from gblm_compress.measure.benchmarking import BenchmarkResult
from gblm_compress.measure.evaluation import EvaluateResult
from gblm_compress.measure.inspection import InspectResult
from gblm_compress.models import loading
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import stage
from gblm_compress.pruning.in_memory import prune_in_place
from gblm_compress.pruning.stage import PruneResult
from gblm_compress.recovery import stage as recovery_stage
from gblm_compress.recovery.stage import RecoverResult
from gblm_compress.runs import advice, comparison, history, pipeline, pushing
from gblm_compress.runs.advice import Advice
from gblm_compress.runs.cells import CompareResult
from gblm_compress.runs.history import ReportResult
from gblm_compress.runs.pushing import PushResult
from gblm_compress.runs.recipe import describe_fault, faults_of, find_recipe, load_recipe
from gblm_compress.runs.run_report import RunReport
from gblm_compress.settings import (
    AdviseSettings,
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    PruneSettings,
    Recipe,
    RecoverSettings,
    ResourceSettings,
)
from gblm_compress.storage.cache import cache_folder
from gblm_compress.storage.records import write_text

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor
    Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel
    Texts: TypeAlias = str | os.PathLike[str] | Iterable[str] | Iterable[Mapping[str, Any]]

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=BaseModel)


def _takes(*settings: type[BaseModel], **elsewhere: str) -> Callable[[F], F]:
    """Show the fields of the settings in a function's signature, with their defaults and types.

    Args:
        elsewhere: {field: the parameter that stands for it}.
    """

    def complete(function: F) -> F:
        signature = signatures.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [
            signatures.Parameter(name, signatures.Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation)
            for kind in settings
            for name, field in kind.model_fields.items()
            if name not in signature.parameters and name not in elsewhere
            for default in [signatures.Parameter.empty if field.is_required() else field.get_default()]
        ]
        function.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return function

    return complete


@_takes(AdviseSettings, PruneSettings, CalibrationSettings, dataset="calibration")
def advise(
    model: "Model",
    *,
    processor: "Processor | None" = None,
    calibration: "Texts" = "c4",
    quiet: bool = False,
    **settings: Any,
) -> Advice:
    """Predict what compressing a model would bring on this machine, before any of it is done.

    Args:
        processor: the tokenizer of a model in memory.
        calibration: as for `prune`; its text is not read.
        settings: fields of `AdviseSettings`, and those of `PruneSettings` and `CalibrationSettings` with which it would
            be pruned.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    kinds = (AdviseSettings, PruneSettings, CalibrationSettings)
    asked, what, sample = _filled(kinds, _on_text(settings, calibration), "advise")
    progress = _progress(quiet)
    with _on_disk(model, processor, progress) as source:
        return advice.advise(source, asked, what, sample, progress=progress)


@_takes(PruneSettings, CalibrationSettings, ResourceSettings, dataset="calibration")
def prune(
    model: "Model",
    output: str | os.PathLike[str] | None = None,
    *,
    processor: "Processor | None" = None,
    calibration: "Texts" = "c4",
    dtype: str = "auto",
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> PruneResult:
    """Set the least important weights to zero, and fit the others to make up for it.

    Args:
        model: a folder, a hub id, a .gguf file, "demo", "tiny", or a transformers model in memory.
        output: the folder to write, whole or not at all; the model is not changed. Without one a model in memory is
            pruned in place, with its dtype and on its device.
        processor: the tokenizer (or image processor) of a model in memory, unless the method needs no data.
        calibration: the name of a dataset, a text file, several texts, or mappings with a key "text".
        settings: fields of `PruneSettings`, `CalibrationSettings` and `ResourceSettings`.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    kinds = (PruneSettings, CalibrationSettings, ResourceSettings)
    what, sample, resources = _filled(kinds, _on_text(settings, calibration), "prune")
    progress = _progress(quiet)
    if output is None:
        if isinstance(model, str | os.PathLike):
            raise UsageError(f"model {str(model)!r} is on disk; give the output folder of the pruned one")
        given = {**resources.model_dump(exclude_defaults=True), "resume": resume, "force": force}
        given |= {"dtype": dtype != "auto", "device": device != "auto"}
        if void := [name for name, value in given.items() if value]:
            raise UsageError(
                f"{' and '.join(void)} would do nothing: without an output folder the model is pruned where it is"
            )
        return prune_in_place(model, processor, what, sample, progress)
    with _on_disk(model, processor, progress) as source:
        return stage.prune(
            source,
            Path(output),
            what,
            sample,
            resources=resources,
            resume=resume,
            dtype=dtype,
            device=device,
            force=force,
            progress=progress,
        )


@_takes(RecoverSettings)
def recover(
    pruned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str],
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> RecoverResult:
    """Train a pruned model to predict what the dense one does; its pattern stays.

    Args:
        pruned: a folder that `prune` wrote.
        output: the folder to write, whole or not at all.
        teacher: the dense model that it was pruned from.
        settings: fields of `RecoverSettings`.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    (what,) = _filled((RecoverSettings,), settings, "recover")
    progress = _progress(quiet)
    source, dense = (resolve_model(os.fspath(model), progress) for model in (pruned, teacher))
    return recovery_stage.recover(
        source, dense, Path(output), what, resume=resume, device=device, force=force, progress=progress
    )


@_takes(GenerateSettings)
def generate(
    model: "Model",
    output: str | os.PathLike[str],
    *,
    processor: "Processor | None" = None,
    device: str = "auto",
    quiet: bool = False,
    **settings: Any,
) -> GenerateResult:
    """Let a model write text, to calibrate and train on where real text of its kind is short.

    Args:
        output: the .txt file to write, whole or not at all; none may be there.
        processor: the tokenizer of a model in memory.
        settings: fields of `GenerateSettings`.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    (what,) = _filled((GenerateSettings,), settings, "generate")
    progress = _progress(quiet)
    with _on_disk(model, processor, progress) as source:
        return generation.generate(source, Path(output), what, device=device, progress=progress)


@_takes(ExportSettings)
def export(
    model: "Model",
    output: str | os.PathLike[str],
    *,
    processor: "Processor | None" = None,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> ExportResult:
    """Write a model as ONNX or as sparse PyTorch, and verify what was written.

    Args:
        settings: fields of `ExportSettings`; `format` is required.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    (what,) = _filled((ExportSettings,), settings, "export")
    progress = _progress(quiet)
    with _on_disk(model, processor, progress) as source:
        return exporters.export(source, Path(output), what, force=force, progress=progress)


@_takes(EvaluateSettings)
def evaluate(
    model: "Model",
    *,
    baseline: "Model | None" = None,
    dataset: "Texts" = "wikitext2",
    processor: "Processor | None" = None,
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
    **settings: Any,
) -> EvaluateResult:
    """Measure perplexity or the metric of another task, fidelity to the dense model, and zero-shot accuracy.

    Args:
        baseline: the dense model.
        dataset: as `calibration` of `prune`.
        processor: of models in memory.
        settings: fields of `EvaluateSettings`.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    (what,) = _filled((EvaluateSettings,), settings | {"dataset": _dataset(dataset)}, "evaluate")
    progress = _progress(quiet)
    with _on_disk(model, processor, progress) as source, _perhaps_on_disk(baseline, processor, progress) as dense:
        return evaluation.evaluate(source, what, baseline=dense, dtype=dtype, device=device, progress=progress)


@_takes(BenchmarkSettings)
def benchmark(
    *models: str | os.PathLike[str],
    baseline: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
    **settings: Any,
) -> BenchmarkResult:
    """Time models beside the dense one: latency, throughput, memory, size. Each is loaded in a process of its own.

    Args:
        models: folders, hub ids, exports.
        baseline: the dense model; once for each runtime, as a folder or an ONNX export.
        settings: fields of `BenchmarkSettings`.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    (what,) = _filled((BenchmarkSettings,), settings, "benchmark")
    progress = _progress(quiet)
    dense = [baseline] if isinstance(baseline, str | os.PathLike) else list(baseline)
    contenders, baselines = ([resolve_model(str(m), progress) for m in group] for group in (models, dense))
    return benchmarking.benchmark(contenders, baselines, what, dtype=dtype, device=device, progress=progress)


def inspect(
    model: "Model",
    heat_map: str | os.PathLike[str] | None = None,
    *,
    processor: "Processor | None" = None,
    force: bool = False,
    quiet: bool = False,
) -> InspectResult:
    """Report the zeros of every layer and the patterns that hold.

    Args:
        heat_map: the PNG to draw, if any: how many weights survive in each column.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    progress = _progress(quiet)
    with _on_disk(model, processor, progress) as source:
        return inspection.inspect(source, None if heat_map is None else Path(heat_map), progress, force=force)


@_takes(CompareSettings, dataset="calibration")
def compare(
    model: "Model",
    output: str | os.PathLike[str],
    *,
    processor: "Processor | None" = None,
    calibration: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
    **settings: Any,
) -> CompareResult:
    """Prune by several methods and patterns, and say what each quality costs; goes on where it was interrupted.

    Args:
        output: folder of the records, table and plot.
        calibration: fields of `CalibrationSettings` but for `seed`; `dataset` as `calibration` of `prune`.
        evaluation: fields of `EvaluateSettings`, likewise.
        settings: fields of `CompareSettings`.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    (grid,) = _filled((CompareSettings,), settings, "compare")
    (sample,) = _filled((CalibrationSettings,), _with_dataset(calibration), "calibration")
    if "seed" in (calibration or {}):
        raise UsageError("calibration: seed would do nothing; `seeds` says how many there are, from 0 on")
    (held_out,) = _filled((EvaluateSettings,), _with_dataset(evaluation), "evaluation")
    progress = _progress(quiet)
    with _on_disk(model, processor, progress) as source:
        return comparison.compare(
            source, Path(output), grid, sample, held_out, dtype=dtype, device=device, progress=progress
        )


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    *,
    set: Iterable[str] = (),
    quiet: bool = False,
) -> RunReport:
    """Carry out a recipe: prune, export, evaluate, benchmark, check gates. A failed gate is no exception.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or its content.
        output: folder of the artefacts and of the report.
        set: "key=value" pairs that change a recipe from a file, for example "prune.alpha=50".

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    if isinstance(recipe, Mapping):
        if changes := tuple(set):
            raise UsageError(f"set={list(changes)} changes a recipe from a file; change the mapping itself")
        (content,) = _filled((Recipe,), dict(recipe), "recipe")
    else:
        content = load_recipe(find_recipe(str(recipe)), tuple(set))
    return pipeline.run(content, Path(output), _progress(quiet))


def report(*runs: str | os.PathLike[str], output: str | os.PathLike[str] = "report.html") -> ReportResult:
    """Join the reports of several runs on one page: the last one against the one before it, and all over time.

    Args:
        runs: folders that `run` wrote, the newest last.
        output: the page to write.

    Raises:
        GblmError: of the kind that says what is wrong. A figure that got worse is no exception: see `regressions`.
    """
    return history.report([Path(run) for run in runs], Path(output))


def push(
    run: str | os.PathLike[str], artefact: str, *, push_to_hub: str | None = None, private: bool = False
) -> PushResult:
    """Put together the complete model card and the files of an artefact, and push them to the hub if asked to.

    Args:
        run: a folder that `run` wrote.
        artefact: the name of a folder in it: "pruned", "bitmask", …
        push_to_hub: the repository, as "OWNER/NAME". If None, nothing leaves the machine.
        private: make a new repository private.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    return pushing.push(Path(run), artefact, push_to_hub, private=private)


def load(
    model: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto", quiet: bool = False
) -> "tuple[PreTrainedModel, Processor]":
    """The model of a folder, dense or packed, in eval mode, and its tokenizer or image processor.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    source = resolve_model(str(model), _progress(quiet))
    device = loading.choose_device(device)
    loaded = loading.load_model(source, loading.choose_dtype(dtype, source, device), device)
    return loaded, loading.load_processor(source)


def _progress(quiet: bool) -> Progress:
    silence_libraries()
    return Progress(quiet)


@contextmanager
def _on_disk(model: "Model", processor: Any, progress: Progress) -> Iterator[ModelSource]:
    """A model as a folder; one in memory is saved to a temporary one."""
    if isinstance(model, str | os.PathLike):
        yield resolve_model(str(model), progress)
        return
    if getattr(model, "hf_quantizer", None) is not None:
        raise UsageError("the model in memory is packed or quantised; give the folder that it was loaded from")
    if processor is None:
        raise UsageError("a model in memory needs its tokenizer or image processor; give processor=")
    with TemporaryDirectory(prefix="gblm-") as folder:
        model.save_pretrained(folder)
        loading.save_processor(processor, Path(folder))
        yield ModelSource(model.config.name_or_path or type(model).__name__, Path(folder))


@contextmanager
def _perhaps_on_disk(model: "Model | None", processor: Any, progress: Progress) -> Iterator[ModelSource | None]:
    if model is None:
        yield None
        return
    with _on_disk(model, processor, progress) as source:
        yield source


def _on_text(settings: dict[str, Any], calibration: "Texts") -> dict[str, Any]:
    """The settings with the text of the calibration.

    Raises:
        UsageError: they name a text themselves.
    """
    if "dataset" in settings:
        raise UsageError("dataset is not known; the text is given as `calibration`")
    return {**settings, "dataset": _dataset(calibration)}


def _with_dataset(values: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(values or {})
    return given | ({"dataset": _dataset(given["dataset"])} if "dataset" in given else {})


def _dataset(texts: "Texts") -> str:
    """The name of a dataset; texts in memory become a file of the cache, called after its content, so that an
    interrupted run can go on.
    """
    if isinstance(texts, str | os.PathLike):
        return str(texts)
    documents = [text if isinstance(text, Mapping) else {"text": text} for text in texts]
    content = "".join(json.dumps(dict(document)) + "\n" for document in documents)
    path = cache_folder() / "texts" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    tasks.data_files(str(path))
    return str(path)


def _filled(kinds: tuple[type[S], ...], values: dict[str, Any], what: str) -> list[Any]:
    """The settings of these kinds that the keywords make.

    Raises:
        UsageError: with all faults; a keyword is a field of none.
    """
    known = {name for kind in kinds for name in kind.model_fields}
    faults = [f"{name}: unknown; {_meant(name, known)}" for name in values if name not in known]
    filled: list[Any] = []
    for kind in kinds:
        try:
            filled.append(kind(**{name: value for name, value in values.items() if name in kind.model_fields}))
        except ValidationError as error:
            faults += [describe_fault(fault, kind) for fault in faults_of(error)]
    if faults:
        raise UsageError("\n".join(f"{what}: {fault}" for fault in faults))
    return filled


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
