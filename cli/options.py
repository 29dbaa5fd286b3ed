"""Options that several commands share, with their help taken from the settings they fill."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from gblm_compress.errors import UsageError
from gblm_compress.runs.recipe import describe_fault, faults_of
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    CompareSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PruneSettings,
    ResourceSettings,
)

S = TypeVar("S", bound=BaseModel)
MODEL_HELP = "A hub id, a local folder, a .gguf file, 'demo' (SmolLM2-135M) or 'tiny' (random weights)."


def option(settings: type[BaseModel], field: str, *names: str) -> Any:
    """An option that fills `field`, described by it."""
    return typer.Option(*names, help=settings.model_fields[field].description)


def split(values: list[str] | str | None) -> tuple[str, ...] | None:
    """The parts of an option that may be repeated, or given once with commas; None where it was not given."""
    given = [values] if isinstance(values, str) else values or []
    return tuple(part.strip() for value in given for part in value.split(",") if part.strip()) or None


def several(settings: type[BaseModel], field: str) -> Any:
    """An option that fills `field` with several values."""
    return typer.Option(help=settings.model_fields[field].description, callback=split)


def overrides(values: list[str] | None) -> tuple[dict[str, Any], ...] | None:
    """`LAYERS=PATTERN[@SPARSITY]` as `OverrideSettings` take it."""
    parsed = []
    for value in values or []:
        layers, equals, budget = value.partition("=")
        pattern, at, sparsity = budget.partition("@")
        if not (layers and equals and pattern):
            raise UsageError(f"--override {value!r}: give LAYERS=PATTERN[@SPARSITY], for example '*.down_proj=6:8'")
        parsed.append({"layers": layers, "pattern": pattern, **({"sparsity": sparsity} if at else {})})
    return tuple(parsed) or None


def fill(settings: type[S], arguments: dict[str, Any], **names: str) -> S:
    """The settings that a command's arguments make.

    Args:
        arguments: of the command; one that was not given (None) is left to the settings' defaults, or to a preset.
        names: {field: the argument that fills it}, where it is not called as the field is.

    Raises:
        UsageError: with all faults, by the names of the options.
    """
    given = {field: arguments.get(names.get(field, field)) for field in settings.model_fields}
    try:
        return settings(**{field: value for field, value in given.items() if value is not None})
    except ValidationError as error:
        raise UsageError("\n".join(_fault(fault, settings, names) for fault in faults_of(error))) from error


def _fault(fault: Any, settings: type[BaseModel], names: dict[str, str]) -> str:
    """A fault of settings with the option's spelling, and of several exceptions the one that has it."""
    text = describe_fault(fault, settings, spell=lambda key, value: f"--{key.replace('_', '-')} {value}")
    if not fault["loc"]:
        return text
    field, *inner = fault["loc"]
    where = f"--{names.get(field, field).replace('_', '-')}"
    if len(inner) > 1:
        where += f" (number {inner[0] + 1}), {inner[1]}"
    return f"{where}: {text.partition(': ')[2]}"


def default(settings: type[BaseModel], field: str) -> Any:
    """The default of a field."""
    return settings.model_fields[field].default


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP + " Exports may be given too.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; it appears whole or not at all.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Dtype = Annotated[str, option(ModelSettings, "dtype")]
Device = Annotated[str, option(ModelSettings, "device")]

Preset = Annotated[str | None, option(PruneSettings, "preset")]
Method = Annotated[str | None, option(PruneSettings, "method")]
Pattern = Annotated[str, option(PruneSettings, "pattern")]
Sparsity = Annotated[float | None, option(PruneSettings, "sparsity")]
GradientNorm = Annotated[str | None, option(PruneSettings, "gradient_norm")]
Alpha = Annotated[float | None, option(PruneSettings, "alpha")]
AlphaScale = Annotated[str | None, option(PruneSettings, "alpha_scale")]
Allocation = Annotated[str | None, option(PruneSettings, "allocation")]
Deviation = Annotated[float | None, option(PruneSettings, "deviation")]
Refine = Annotated[str | None, option(PruneSettings, "refine")]
Update = Annotated[str | None, option(PruneSettings, "update")]
Damping = Annotated[float | None, option(PruneSettings, "damping")]
ReconstructionEpochs = Annotated[int | None, option(PruneSettings, "reconstruction_epochs")]
ReconstructionRounds = Annotated[int | None, option(PruneSettings, "reconstruction_rounds")]
ReconstructionRate = Annotated[float | None, option(PruneSettings, "reconstruction_rate")]
DistillationEpochs = Annotated[int | None, option(PruneSettings, "distillation_epochs")]
DistillationRate = Annotated[float | None, option(PruneSettings, "distillation_rate")]
FitDtype = Annotated[str | None, option(PruneSettings, "fit_dtype")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="LAYERS=PATTERN[@SPARSITY]",
        help="An exception, for example '*.down_proj=6:8', '*.0.*=dense' or '*.o_proj=unstructured@0.3'; repeatable.",
        callback=overrides,
    ),
]
Memory = Annotated[str | None, option(ResourceSettings, "memory")]
Offload = Annotated[bool | None, option(ResourceSettings, "offload", "--offload/--no-offload")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")]
Targets = Annotated[list[str] | None, several(PruneSettings, "targets")]
Ignore = Annotated[list[str] | None, several(PruneSettings, "ignore")]
Calibration = Annotated[str, option(CalibrationSettings, "dataset", "--calibration")]
Samples = Annotated[int, option(CalibrationSettings, "samples")]
CalibrationLength = Annotated[int, option(CalibrationSettings, "sequence_length", "--sequence-length")]
Seed = Annotated[int, option(CalibrationSettings, "seed")]

Format = Annotated[str, option(ExportSettings, "format")]
ExportDtype = Annotated[str, option(ExportSettings, "dtype", "--dtype")]
Sparse = Annotated[bool, option(ExportSettings, "sparse", "--sparse")]
Kernels = Annotated[bool, option(ExportSettings, "kernels", "--kernels")]

Dataset = Annotated[str, option(EvaluateSettings, "dataset")]
EvaluationLength = Annotated[int, option(EvaluateSettings, "sequence_length", "--sequence-length")]
Tasks = Annotated[list[str] | None, several(EvaluateSettings, "tasks")]
Limit = Annotated[int | None, option(EvaluateSettings, "limit")]
IncludePath = Annotated[str | None, option(EvaluateSettings, "include_path")]
MaxWindows = Annotated[int | None, option(EvaluateSettings, "max_windows")]
Baseline = Annotated[str | None, typer.Option(help="The dense model, for fidelity: KL divergence and top-1 agreement.")]

Methods = Annotated[list[str] | None, several(CompareSettings, "methods")]
Patterns = Annotated[list[str] | None, several(CompareSettings, "patterns")]
Seeds = Annotated[int, option(CompareSettings, "seeds")]

Baselines = Annotated[
    list[str],
    typer.Option("--baseline", help="The dense model; once for each runtime, as a folder or an ONNX export."),
]
Batch = Annotated[str, several(BenchmarkSettings, "batch")]
Prompt = Annotated[int, option(BenchmarkSettings, "prompt")]
Generate = Annotated[int, option(BenchmarkSettings, "generate")]
Repeats = Annotated[int, option(BenchmarkSettings, "repeats")]
Warmup = Annotated[int, option(BenchmarkSettings, "warmup")]
Runtimes = Annotated[list[str] | None, several(BenchmarkSettings, "runtimes")]
Threads = Annotated[int | None, option(BenchmarkSettings, "threads")]
