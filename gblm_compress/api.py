"""Every command as a Python function; the command line is made from these. Settings are keywords, named as in recipes.

Importing this loads no torch: a command imports its stage once it has found its models and texts.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from gblm_compress import __version__, errors
from gblm_compress.command import REQUIRED, Command, command
from gblm_compress.errors import GateError, GblmError, UsageError
from gblm_compress.machine import memory, share_cores
from gblm_compress.progress import Progress
from gblm_compress.runs.recipe import find_recipe, load_recipe, recipe_of
from gblm_compress.runs.recipe import schema as recipe_schema
from gblm_compress.settings import (
    AdviseSettings,
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    ComputeSettings,
    EvaluateSettings,
    ExportSettings,
    Panel,
    PruneSettings,
    RecoverSettings,
    ResourceSettings,
)
from gblm_compress.storage import outputs

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from gblm_compress.exporters import ExportResult
    from gblm_compress.measure.benchmarking import BenchmarkResult
    from gblm_compress.measure.evaluation import EvaluateResult
    from gblm_compress.measure.inspection import InspectResult
    from gblm_compress.pruning.planning import PlanResult
    from gblm_compress.pruning.stage import PruneResult
    from gblm_compress.runs.advice import Advice
    from gblm_compress.runs.comparison import CompareResult
    from gblm_compress.runs.pushing import PushResult
    from gblm_compress.runs.report import ReportResult
    from gblm_compress.runs.run_report import RunReport
    from gblm_compress.training.recovery import RecoverResult

    Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor
else:
    PreTrainedModel = Processor = Any

MODEL = "A hub id, a local folder, 'demo' (SmolLM2-135M-Instruct) or 'tiny' (random weights)."
DENSE = "The dense model that was pruned."
FOLDER = "Output folder; it appears only when complete."

FileName = str | os.PathLike[str]
Model = Annotated[FileName | PreTrainedModel, MODEL]
InMemory = Annotated[Processor | None, "Tokenizer or image processor of a model in memory.", Panel.NO_OPTION]
Output = Annotated[FileName, FOLDER]
Force = Annotated[bool, "Replace the output if it exists."]
Resume = Annotated[bool, "Continue an interrupted run of the same command."]
Quiet = Annotated[bool, "Show no progress."]
RecipeName = Annotated[FileName, "A YAML file, or the name of a shipped recipe."]
Changes = Annotated[Iterable[str], "Change a key of the recipe, for example prune.alpha=50. May be repeated."]
Calibration = Annotated[CalibrationSettings, {"dataset": "calibration"}]


@command("gblm-compress advise demo --pattern 2:4")
def advise(model: Model, *, settings: AdviseSettings, processor: InMemory = None, quiet: Quiet = False) -> "Advice":
    """Predict size and speed on this machine before you prune."""
    with _found(model, processor=processor, quiet=quiet) as (progress, source):
        from gblm_compress.runs import advice

        return advice.advise(source, settings, progress=progress)


@command("gblm-compress prune demo -o pruned --samples 16 --sequence-length 512")
def prune(
    model: Model,
    output: Annotated[FileName | None, FOLDER, REQUIRED] = None,
    *,
    settings: PruneSettings,
    text: Calibration,
    compute: ComputeSettings,
    resources: ResourceSettings,
    processor: InMemory = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
) -> "PruneResult":
    """Set the least important weights to zero and adjust the rest.

    In Python, `model` may be a model in memory, and `calibration` texts or mappings with the key "text". Without an
    output folder the model is pruned in place, with its dtype and on its device.
    """
    if output is None:
        if isinstance(model, str | os.PathLike):
            raise UsageError(f"model {str(model)!r} is on disk; give an output folder for the pruned one")
        given = {**resources.model_dump(exclude_defaults=True), "resume": resume, "force": force}
        given |= compute.model_dump(exclude_defaults=True)
        if void := " and ".join(name for name, value in given.items() if value):
            raise UsageError(f"{void} would do nothing: without an output folder the model is pruned in place")

        from gblm_compress.pruning import stage

        return stage.prune_in_place(model, processor, settings, text, _progress(quiet))
    path, texts = Path(output), text.datasets if settings.needs_text else ()
    outputs.check_output(path, force)
    with _found(model, processor=processor, texts=texts, quiet=quiet) as (progress, source):
        from gblm_compress.pruning import stage

        job = stage.PruneJob(source, settings, text, compute, resources)
        return stage.prune(job, path, progress, resume=resume, force=force)


@command("gblm-compress plan demo --pattern 2:4 --samples 16 --sequence-length 512")
def plan(
    model: Annotated[FileName, MODEL],
    *,
    settings: PruneSettings,
    text: Calibration,
    compute: ComputeSettings,
    resources: ResourceSettings,
    quiet: Quiet = False,
) -> "PlanResult":
    """Predict the time, memory and disk that pruning takes. Downloads no weights."""
    from gblm_compress.models.finding import outlined

    progress = _progress(quiet)
    with outlined(os.fspath(model), progress) as source:
        from gblm_compress.pruning import stage

        return stage.plan(stage.PruneJob(source, settings, text, compute, resources), progress)


@command("gblm-compress recover pruned -o recovered --teacher demo --data train.txt")
def recover(
    pruned: Annotated[FileName, "A folder that `prune` wrote."],
    output: Output,
    *,
    teacher: Annotated[FileName, DENSE],
    settings: RecoverSettings,
    compute: Annotated[ComputeSettings, {"dtype": None}],
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
) -> "RecoverResult":
    """Train a pruned model to match the dense one. Weights that are zero stay zero."""
    outputs.check_output(Path(output), force)
    with _found(pruned, teacher, texts=settings.datasets, quiet=quiet) as (progress, source, dense):
        from gblm_compress.training import recovery

        what = recovery.Recovery(source, dense, Path(output), settings, compute.device, force)
        return recovery.recover(what, progress, resume)


@command("gblm-compress export pruned -o onnx --format onnx --kernels --quantise int8")
def export(
    model: Model,
    output: Output,
    *,
    settings: ExportSettings,
    processor: InMemory = None,
    force: Force = False,
    quiet: Quiet = False,
) -> "ExportResult":
    """Write a model as ONNX or sparse PyTorch, and verify the files."""
    outputs.check_output(Path(output), force)
    with _found(model, processor=processor, quiet=quiet) as (progress, source):
        from gblm_compress import exporters

        return exporters.export(source, Path(output), settings, force=force, progress=progress)


@command("gblm-compress evaluate pruned --baseline demo --dataset demo")
def evaluate(
    model: Model,
    *,
    baseline: Annotated[Model | None, "The dense model, for fidelity: KL divergence and top-1 agreement."] = None,
    settings: EvaluateSettings,
    compute: ComputeSettings,
    processor: InMemory = None,
    quiet: Quiet = False,
) -> "EvaluateResult":
    """Measure perplexity, fidelity and zero-shot accuracy. Tasks other than text have their own metric."""
    models = [model] if baseline is None else [model, baseline]
    if settings.tasks and not settings.model_fields_set & {"dataset", "max_windows"}:
        settings = settings.model_copy(update={"max_windows": 0})
    texts, tasks = [settings.dataset] if settings.max_windows != 0 else [], settings.include_path
    with _found(*models, processor=processor, texts=texts, tasks=tasks, quiet=quiet) as (progress, source, *dense):
        from gblm_compress.measure import evaluation

        reference = dense[0] if dense else None
        return evaluation.evaluate(source, settings, baseline=reference, progress=progress, **compute.model_dump())


@command("gblm-compress compare demo --patterns 2:4 --calibration demo --dataset demo")
def compare(
    model: Model,
    output: Annotated[FileName, "Folder of the records, table and plot."] = "comparison",
    *,
    settings: CompareSettings,
    text: Annotated[CalibrationSettings, {"dataset": "calibration", "seed": None}],
    evaluation: Annotated[EvaluateSettings, {"sequence_length": "evaluation_length"}],
    compute: ComputeSettings,
    processor: InMemory = None,
    quiet: Quiet = False,
) -> "CompareResult":
    """Prune a model in several ways, and compare the results. An interrupted run resumes."""
    outputs.check_workable(Path(output), "comparison")
    texts, tasks = [*text.datasets, evaluation.dataset], evaluation.include_path
    with _found(model, processor=processor, texts=texts, tasks=tasks, quiet=quiet) as (progress, source):
        from gblm_compress.measure.evaluation import Reference
        from gblm_compress.runs import comparison

        dense = Reference(source, **compute.model_dump(), folder=Path(output))
        grid = comparison.Grid(dense, Path(output), settings, text, evaluation, compute)
        return comparison.compare(grid, progress)


@command("gblm-compress benchmark pruned bitmask --baseline demo")
def benchmark(
    *models: Annotated[FileName, MODEL + " Or an export."],
    baseline: Annotated[
        FileName | Iterable[FileName],
        "The dense model. If you time ONNX exports, it is exported too, unless you give its export. May be repeated.",
    ],
    settings: BenchmarkSettings,
    compute: ComputeSettings,
    quiet: Quiet = False,
) -> "BenchmarkResult":
    """Time models against the dense one. Reports latency, throughput, memory and size."""
    dense = [baseline] if isinstance(baseline, str | os.PathLike) else list(baseline)
    with _found(*models, *dense, quiet=quiet) as (progress, *sources):
        from gblm_compress.measure import benchmarking
        from gblm_compress.runs import baselines

        contest = benchmarking.Contest(sources[: len(models)], sources[len(models) :], settings, compute)
        return benchmarking.benchmark(baselines.completed(contest, progress), progress)


@command("gblm-compress inspect pruned --heat-map zeros.png")
def inspect(
    model: Model,
    heat_map: Annotated[FileName | None, "Draw a PNG of the share of weights that survive in each column."] = None,
    *,
    processor: InMemory = None,
    force: Force = False,
    quiet: Quiet = False,
) -> "InspectResult":
    """Show where the zeros are, and the patterns that they follow."""
    picture = None if heat_map is None else Path(heat_map)
    if picture is not None:
        outputs.HEAT_MAP.check(picture, force)
    with _found(model, processor=processor, quiet=quiet) as (progress, source):
        from gblm_compress.measure import inspection

        return inspection.inspect(source, progress, picture, force)


@command("gblm-compress run quickstart -o first")
def run(
    recipe: Annotated[FileName | Mapping[str, Any], "A YAML file, or the name of a shipped recipe."],
    output: Annotated[FileName | None, "Folder of the artefacts; runs/RECIPE if unset."] = None,
    *,
    set: Changes = (),
    junit: Annotated[FileName | None, "Write the gates to this file, as JUnit XML."] = None,
    summary: Annotated[FileName | None, "Write the verdict and tables to this file, as Markdown."] = None,
    quiet: Quiet = False,
) -> "RunReport":
    """Run a recipe: prune, export, evaluate, benchmark, check gates.

    In Python, `recipe` may be a mapping, and a failed gate raises nothing: see `failed_gates`.
    """
    if isinstance(recipe, Mapping):
        if changes := tuple(set):
            raise UsageError(f"set={list(changes)} changes a recipe from a file; change the mapping itself")
        if output is None:
            raise UsageError("a recipe in memory has no name; give the output folder")
        content, folder = recipe_of(recipe), Path(output)
    else:
        path = find_recipe(str(recipe))
        content, folder = load_recipe(path, tuple(set)), Path(output or Path("runs") / path.stem)
    from gblm_compress.runs import report as documents

    outputs.check_workable(folder, "run")
    asked = ((junit, outputs.JUNIT, documents.junit), (summary, outputs.SUMMARY, documents.markdown))
    with ExitStack() as stack:
        written = [
            (stack.enter_context(kind.reserved(Path(name))), content_of)
            for name, kind, content_of in asked
            if name is not None
        ]
        progress = _progress(quiet)

        from gblm_compress.runs import pipeline

        result = pipeline.run(content, folder, progress)
        for write, content_of in written:
            write(content_of(result))
        return result


@command("gblm-compress report runs/before runs/after -o report.html")
def report(
    *runs: Annotated[FileName, "A folder that `run` wrote, or two to compare, the newest last."],
    output: Annotated[FileName, "Page to write."] = "report.html",
    fail_on_regression: Annotated[bool, "Exit with code 6 if a figure of the last run got worse."] = False,
) -> "ReportResult":
    """Write a report page for a run. With two runs, it also shows the changes."""
    from gblm_compress.runs import report as documents

    result = documents.report([Path(run) for run in runs], Path(output))
    if fail_on_regression and (worse := result.regressions):
        failure = errors.together(GateError, f"{len(worse)} figures got worse", worse)
        failure.result = result
        raise failure
    return result


@command("gblm-compress push runs/quickstart pruned")
def push(
    run: Annotated[FileName, "A folder that `run` wrote."],
    artefact: Annotated[str, "The name of a folder in it: pruned, bitmask, …"],
    *,
    push_to_hub: Annotated[str | None, "Repository to push to. If unset, nothing leaves the machine."] = None,
    private: Annotated[bool, "Make a new repository private."] = False,
) -> "PushResult":
    """Show the model card and files of an artefact. Push them if a repository is named."""
    from gblm_compress.runs import pushing

    return pushing.push(Path(run), artefact, push_to_hub, private=private)


@command("gblm-compress validate quickstart --set prune.pattern=2:4")
def validate(recipe: RecipeName, *, set: Changes = (), quiet: Quiet = False) -> dict[str, Any]:
    """Check a recipe, and that this machine can run it. Lists all faults, or the stages of a run; downloads nothing."""
    try:
        path = find_recipe(str(recipe))
        content = load_recipe(path, tuple(set))
        progress = _progress(quiet)

        from gblm_compress.runs import pipeline

        errors.raise_all(pipeline.check(content, progress))
    except GblmError as error:
        error.result = {"valid": False, "faults": error.faults or (str(error),), "recipe": None}
        raise
    found = {"valid": True, "faults": [], "recipe": content.model_dump(mode="json"), "path": str(path)}
    return found | pipeline.outlook(content)


@command("gblm-compress schema > recipe.schema.json")
def schema() -> dict[str, Any]:
    """Print the JSON Schema of recipes, for editors."""
    return recipe_schema()


@command("gblm-compress doctor")
def doctor(*, quiet: Quiet = False) -> dict[str, Any]:
    """Show the features of this machine and their use."""
    _progress(quiet)

    from gblm_compress.measure.doctor import diagnose

    findings = diagnose()
    return {"findings": findings, "ok": all(finding["ok"] for finding in findings)}


def load(
    model: FileName, *, dtype: str = "auto", device: str = "auto", quiet: bool = False
) -> tuple[PreTrainedModel, Processor]:
    """Load a dense or packed model in eval mode, and its tokenizer or image processor."""
    with _found(model, quiet=quiet) as (_, source):
        from gblm_compress.models import loading

        device = loading.choose_device(device)
        loaded = loading.load_model(source, loading.choose_dtype(dtype, source, device), device)
        return loaded, loading.load_processor(source)


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "Make": (prune, recover, export, run),
    "Measure": (evaluate, benchmark, compare, inspect, advise, plan),
    "Other": (report, push, validate, schema, doctor),
}
GROUPS: dict[str, tuple[Command, ...]] = {name: tuple(each.command for each in of) for name, of in _FUNCTIONS.items()}
COMMANDS: tuple[Command, ...] = tuple(command for commands in GROUPS.values() for command in commands)


def _progress(quiet: bool) -> Progress:
    """Progress, shown by the first process that torchrun started. Libraries print nothing from here on."""
    progress = Progress(quiet or os.environ.get("RANK", "0") != "0")
    if "torch" not in sys.modules:  # a sign of life before the seconds that torch and transformers take to load
        progress.say(f"gblm-compress {__version__} starts …")
    if memory.is_own_process:
        share_cores()

    from gblm_compress.models.finding import silence_libraries

    silence_libraries()
    return progress


@contextmanager
def _found(
    *models: Any, quiet: bool, processor: Any = None, texts: Iterable[str] = (), tasks: str | None = None
) -> Iterator[tuple[Any, ...]]:
    """The progress and each model as a folder; a model in memory is saved to a temporary one.

    All names are looked up before anything is downloaded and before torch is loaded.
    """
    from gblm_compress.measure.zero_shot import check_folder
    from gblm_compress.models.finding import TINY, find_here, resolve_model
    from gblm_compress.tasks import data_files

    names = [os.fspath(model) for model in models if isinstance(model, str | os.PathLike)]
    looks: list[Any] = [partial(find_here, name) for name in names if name != TINY]  # tiny is built if missing
    if not all(os.path.isdir(os.path.expanduser(name)) for name in names):
        looks += [partial(data_files, name) for name in texts]
    errors.raise_all(errors.collect([*looks, partial(check_folder, tasks)]))
    progress = _progress(quiet)
    with ExitStack() as stack:

        def source_of(model: Any) -> Any:
            if isinstance(model, str | os.PathLike):
                return resolve_model(os.fspath(model), progress)
            return _saved(model, processor, Path(stack.enter_context(TemporaryDirectory(prefix="gblm-"))))

        yield progress, *map(source_of, models)


def _saved(model: Any, processor: Any, folder: Path) -> Any:
    from gblm_compress.models import loading
    from gblm_compress.models.source import ModelSource

    if getattr(model, "hf_quantizer", None) is not None:
        raise UsageError("the model in memory is packed or quantised; give the folder that it was loaded from")
    if processor is None:
        raise UsageError("a model in memory needs its tokenizer or image processor; give processor=")
    model.save_pretrained(folder)
    loading.save_processor(processor, folder)
    return ModelSource(model.config.name_or_path or type(model).__name__, folder)
