"""Options made from the fields of settings, and those that fill no settings.

A command takes settings as parameters; `from_settings` turns each into one option per field. A new option is therefore
a new field: its type, range, default, description and panel are all that `--help`, parsing and completion need.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from typer.core import TyperCommand

from gblm_compress import suggestions
from gblm_compress.errors import UsageError
from gblm_compress.runs.recipe import describe_fault, faults_of
from gblm_compress.settings import OverrideSettings, Panel, Settings, Source

TYPES: dict[str, type] = {"boolean": bool, "integer": int, "number": float}  # of JSON; the others are text
MODEL_HELP = "A hub id, a local folder, a .gguf file, 'demo' (SmolLM2-135M) or 'tiny' (random weights)."


@dataclass(frozen=True)
class Spelt:
    """How a command offers settings: `Annotated[EvaluateSettings, Spelt(rename={"dataset": "text"})]`.

    Attributes:
        rename: {field: the name of its option}, where they differ.
        leave_out: the fields without an option, which keep their defaults.
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Syntax:
    """How nested settings are written as one text."""

    metavar: str
    example: str
    parse: Callable[[str], Any]


def from_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every parameter that is settings replaced by options, one for each field.

    An option that is not given leaves its field to a preset, or to the default.

    Raises:
        TypeError: a name in `Spelt` is no field of the settings.
        ValueError: two options have one name.
    """
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    own, parts = [], {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if offered := _settings_of(parameter.annotation):
            parts[parameter.name] = offered
            parameters += _parameters(*offered)
        else:
            own.append(parameter.name)
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_settings(context: typer.Context, **arguments: Any) -> None:
        given = {name: value for name, value in arguments.items() if _is_given(context, name)}
        filled = {name: _fill(settings, spelt, given) for name, (settings, spelt) in parts.items()}
        command(**{name: arguments[name] for name in own}, **filled)

    cast(Any, with_settings).__signature__ = inspect.Signature(parameters)
    return with_settings


class PanelCommand(TyperCommand):
    """A command whose help lists the options panel by panel, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """As the base class, with a section for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
                panels.setdefault(panel or Panel.COMMON.value, []).append(record)
        alone = len(panels.keys() - {"Arguments"}) == 1
        for panel, records in panels.items():
            with formatter.section("Options" if alone and panel != "Arguments" else panel):
                formatter.write_dl(records)


def _settings_of(annotation: Any) -> tuple[type[Settings], Spelt] | None:
    """The settings that a command's parameter is, and how they are offered; None where it is something else."""
    kind, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    if not (isinstance(kind, type) and issubclass(kind, Settings)):
        return None
    spelt = next((entry for entry in metadata if isinstance(entry, Spelt)), Spelt())
    for name in (*spelt.rename, *spelt.leave_out):
        if name not in kind.model_fields:
            raise TypeError(f"{name!r} is no field of {kind.__name__}; there are {', '.join(kind.model_fields)}")
    return kind, spelt


def _parameters(settings: type[Settings], spelt: Spelt) -> list[inspect.Parameter]:
    schemas = settings.model_json_schema()["properties"]
    return [
        _parameter(settings, name, spelt.rename.get(name, name), schemas[name])
        for name, field in settings.model_fields.items()
        if name not in spelt.leave_out and Panel.NO_OPTION not in field.metadata
    ]


def _parameter(settings: type[Settings], name: str, spelling: str, schema: dict[str, Any]) -> inspect.Parameter:
    """A parameter as Typer reads it, for the option that fills one field."""
    described = settings.model_fields[name]
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    schema = kinds[0] if len(kinds) == 1 else {}  # what may be of several kinds is text, which the settings read
    several = schema.get("type") == "array"
    schema = schema["items"] if several else schema
    kind, syntax = TYPES.get(schema.get("type", ""), str), _syntax(settings, name)
    choices = suggestions.allowed(settings, name)
    default = described.get_default(call_default_factory=True)
    flag = f"--{spelling.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool and default is not False else flag,
        help=_help(described.description or "", choices, _range(schema), syntax),
        metavar=syntax.metavar if syntax else f"<{kind.__name__}>,..." if several else None,
        autocompletion=_completion(choices, several) if choices else None,
        rich_help_panel=next((entry.value for entry in described.metadata if isinstance(entry, Panel)), None),
    )
    if several:
        kind, default = list[str], None if default is None else [str(value) for value in default]
    return inspect.Parameter(
        spelling,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind | None, option],
        default=inspect.Parameter.empty if described.is_required() else default,
    )


def _help(description: str, choices: tuple[str, ...], limits: str, syntax: Syntax | None) -> str:
    """The description, and what it does not say itself: an example, the choices, the range."""
    explained = set(choices) <= set(re.findall(r"[\w-]+", description))
    named = "" if explained else f"[{', '.join(choices)}]"
    return " ".join(filter(None, (description, syntax.example if syntax else "", named, limits)))


def _range(schema: dict[str, Any]) -> str:
    low = [f"{schema[key]}{sign}" for key, sign in (("minimum", "<="), ("exclusiveMinimum", "<")) if key in schema]
    high = [f"{sign}{schema[key]}" for key, sign in (("maximum", "<="), ("exclusiveMaximum", "<")) if key in schema]
    return f"[{''.join(low)}x{''.join(high)}]" if low or high else ""


def _completion(choices: tuple[str, ...], several: bool) -> Callable[[str], list[str]]:
    """What a shell offers: the choices, in a list those of its last part."""

    def complete(incomplete: str) -> list[str]:
        before, comma, _ = incomplete.rpartition(",") if several else ("", "", "")
        return [before + comma + choice for choice in choices]

    return complete


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _syntax(settings: type[Settings], name: str) -> Syntax | None:
    """How the items of a field are written, where they are settings themselves."""
    arguments = get_args(settings.model_fields[name].annotation)
    return next((SYNTAXES[kind] for kind in arguments if isinstance(kind, type) and kind in SYNTAXES), None)


def _fill(settings: type[Settings], spelt: Spelt, given: dict[str, Any]) -> Settings:
    """The settings that the options given on the command line make.

    Raises:
        UsageError: with all faults, by the names of the options.
    """
    values: dict[str, Any] = {}
    for name in settings.model_fields:
        value = given.get(spelt.rename.get(name, name))
        if isinstance(value, list):
            syntax = _syntax(settings, name)
            value = tuple(syntax.parse(part) if syntax else part for part in _split(value)) if value else None
        if value is not None and name not in spelt.leave_out:
            values[name] = value
    try:
        return settings(**values)
    except ValidationError as error:
        raise UsageError("\n".join(_fault(fault, settings, spelt.rename) for fault in faults_of(error))) from error


def _split(values: list[str]) -> list[str]:
    """The parts of an option that may be repeated, or given once with commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _fault(fault: Any, settings: type[BaseModel], rename: Mapping[str, str]) -> str:
    """A fault of settings with the option's spelling, and of several exceptions the one that has it."""
    text = describe_fault(fault, settings, spell=lambda key, value: f"--{key.replace('_', '-')} {value}")
    if not fault["loc"]:
        return text
    name, *inner = fault["loc"]
    where = f"--{rename.get(name, name).replace('_', '-')}"
    if len(inner) > 1:
        where += f" (number {inner[0] + 1}), {inner[1]}"
    return f"{where}: {text.partition(': ')[2]}"


def _text(text: str) -> str:
    """What the settings read themselves."""
    return text


def _override(text: str) -> dict[str, Any]:
    """`LAYERS=PATTERN[@SPARSITY]` as `OverrideSettings` take it."""
    layers, equals, budget = text.partition("=")
    pattern, at, sparsity = budget.partition("@")
    if not (layers and equals and pattern):
        raise UsageError(f"--override {text!r}: give LAYERS=PATTERN[@SPARSITY], for example '*.down_proj=6:8'")
    return {"layers": layers, "pattern": pattern, **({"sparsity": sparsity} if at else {})}


SYNTAXES: dict[type, Syntax] = {
    OverrideSettings: Syntax(
        "LAYERS=PATTERN[@SPARSITY],...",
        "For example '*.down_proj=6:8', '*.0.*=dense' or '*.o_proj=unstructured@0.3'.",
        _override,
    ),
    Source: Syntax("SRC[=WEIGHT],...", "For example c4, or wiki.txt=0.5,c4=0.5.", _text),
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Pruned = Annotated[str, typer.Argument(metavar="PRUNED", help="A folder that `prune` wrote.")]
Teacher = Annotated[str, typer.Option(help="The dense model that it was pruned from.")]
Models = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP + " Exports may be given too.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, for example prune.alpha=50.")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; it appears whole or not at all.")]
TextFile = Annotated[
    Path, typer.Option("-o", "--output", help="A .txt file that is not there yet; it appears whole or not at all.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")]
Baseline = Annotated[str | None, typer.Option(help="The dense model, for fidelity: KL divergence and top-1 agreement.")]
Baselines = Annotated[
    list[str],
    typer.Option("--baseline", help="The dense model; once for each runtime, as a folder or an ONNX export."),
]
