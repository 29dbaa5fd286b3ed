"""Makes the program's commands from the functions of `api`: an option for each parameter and each settings field.

A keyword of a command's summary is an option too; it changes only the output.
"""

import re
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from gblm_compress.cli import summaries
from gblm_compress.command import REQUIRED, Command, flag_of
from gblm_compress.errors import GateError, GblmError, together
from gblm_compress.settings import Panel, Settings
from gblm_compress.settings.fields import MANY, choices_of

TYPES: dict[str, type] = {"boolean": bool, "integer": int, "number": float}  # by their names in JSON; others are text
METAVARS = {
    "set": "KEY=VALUE", "push_to_hub": "OWNER/NAME", "overrides": "LAYERS=PATTERN[@SPARSITY],...",
    "data": "SRC[=WEIGHT],...", **dict.fromkeys(("output", "heat_map", "junit", "summary"), "<path>"),
}  # fmt: skip
JSON = Annotated[bool, typer.Option("--json", help="Print only one JSON document on stdout.")]
ALL = "--help-all"
COMMON = ("Arguments", Panel.COMMON.value)


def _all_options(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta[ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HELP_ALL = Annotated[
    bool, typer.Option(ALL, callback=_all_options, is_eager=True, help="Show all options, including the rare ones.")
]


class Group(TyperGroup):
    """The program. Its help lists the commands by group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[Any, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            line = (command.help or "").partition(". ")[0].removesuffix(".") + "."
            groups.setdefault(getattr(command, "rich_help_panel", None), []).append((name, line))
        width = max(map(len, self.commands))
        for group, entries in groups.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), line) for name, line in entries])


class PanelCommand(TyperCommand):
    """A command whose help lists the options by panel, as plain text, and ends with an example."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
                name = str(parameter.metavar) if is_argument else record[0]
                panels.setdefault(panel or Panel.COMMON.value, []).append((name, record[1]))
        alone = not panels.keys() - {*COMMON}
        for panel, entries in panels.items():
            if panel in COMMON or ctx.meta.get(ALL):
                with formatter.section("Options" if alone and panel != "Arguments" else panel):
                    formatter.write_dl([entry for entry in entries if not (alone and entry[0] == ALL)])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\nExample:\n  {self.epilog}\n" if self.epilog else "")


def add(program: typer.Typer, command: Command, group: str = "Commands") -> None:
    """Give the program a command. An option that is not given leaves its field to a preset or the default."""
    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    own = [_own(each) for each in command.own.values() if Panel.NO_OPTION not in get_args(each.annotation)]
    views = {view.name: _own(view) for view in summaries.views(command.name)}
    flags = [*(each for each in own if each.default is False), *views.values()]
    parameters += [each for each in own if each not in flags]
    for part in command.parts.values():
        schemas = part.kind.model_json_schema()["properties"]
        for field, name in part.names.items():
            if Panel.NO_OPTION not in part.kind.model_fields[field].metadata:
                parameters.append(_option(part.kind, field, name, schemas[field]))
    parameters += flags
    for name, annotation in (("json_", JSON), ("help_all", HELP_ALL)):
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=False))
    several = [name for name, each in command.own.items() if each.kind is each.VAR_POSITIONAL]

    def called(context: typer.Context, json_: bool, help_all: bool, **arguments: Any) -> None:
        sources = {name: context.get_parameter_source(name) for name in arguments}
        given = {name: arguments[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
        said = dict(given)
        own = {name: given.pop(name) for name in command.own if name in given}
        shown = {name: given.pop(name) for name in views if name in given}
        positional = [value for name in several for value in own.pop(name)]
        for name, value in given.items():
            if isinstance(value, list):  # of an option that is repeated or has commas
                given[name] = tuple(part.strip() for part in ",".join(value).split(",") if part.strip())
        try:
            result = command.function(*positional, **own, **command.fill(given, flag_of))
        except GblmError as error:
            if error.result is not None:
                summaries.show(command.name, error.result, json_)
            raise
        summaries.show(command.name, result, json_, said, shown)
        if failed := getattr(result, "failed_gates", None):
            count = f"{len(failed)} of {len(result.gates)} gates failed"
            raise together(GateError, count, [gate.sentence for gate in failed])

    described: Any = called
    described.__signature__ = Signature(parameters)
    described.__doc__ = (command.function.__doc__ or "").partition("\n\n")[0]
    made = program.command(command.name, cls=PanelCommand, epilog=command.example, rich_help_panel=group)
    made(described)


def _own(parameter: Parameter) -> Parameter:
    annotation, text, *marks = get_args(parameter.annotation)
    name, flag = parameter.name, flag_of(parameter.name)
    many = parameter.kind is parameter.VAR_POSITIONAL or "Iterable" in str(annotation)
    required = parameter.default is Parameter.empty or REQUIRED in marks
    made: Any
    if required and parameter.kind is not parameter.KEYWORD_ONLY and name != "output":
        made = typer.Argument(metavar=name.upper().removesuffix("S" if many else ""), help=text)
    else:
        flags = ("-o", flag) if name == "output" else (flag,)
        made = typer.Option(*flags, help=text, metavar=METAVARS.get(name, "<str>" if many else None))
    kind: Any = bool if annotation is bool else list[str] if many else str
    default = Parameter.empty if required else None if many else parameter.default
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind | None, made], default=default)


def _option(settings: type[Settings], field: str, name: str, schema: dict[str, Any]) -> Parameter:
    described = settings.model_fields[field]
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    schema = kinds[0] if len(kinds) == 1 else {}  # a field of several types is text, and the settings parse it
    if True in schema.get("enum", ()):  # other values are for recipes and Python
        schema = {"type": "boolean"}
    several = schema.get("type") == "array"
    schema = schema["items"] if several else schema
    kind, flag = TYPES.get(schema.get("type", ""), str), flag_of(name)
    choices = () if kind is bool else tuple(map(str, choices_of(settings, field).values))
    default = described.get_default(call_default_factory=True)

    def complete(incomplete: str) -> list[str]:  # completes the last part of a list
        return [incomplete[: incomplete.rfind(",") + 1] + choice for choice in choices]

    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool and default is not False else flag,
        help=_help(described.description or "", choices, schema),
        metavar=METAVARS.get(name, f"<{kind.__name__}>,..." if several else None),
        autocompletion=complete if choices else None,
        rich_help_panel=next((entry.value for entry in described.metadata if isinstance(entry, Panel)), None),
    )
    if several:
        kind, default = list[str], None if default is None else [str(value) for value in default]
    elif isinstance(default, tuple):
        default = ",".join(map(str, default))
    default = Parameter.empty if described.is_required() else default
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind | None, option], default=default)


def _help(description: str, choices: tuple[str, ...], schema: dict[str, Any]) -> str:
    """The description, then the range, and the choices that it does not name."""
    explained = set(choices) <= set(re.findall(r"[\w-]+", description))
    named = "" if explained else f" [{', '.join(choices)}]"
    low = [f"{schema[key]}{sign}" for key, sign in (("minimum", "<="), ("exclusiveMinimum", "<")) if key in schema]
    high = [
        f"{sign}{schema[key]}"
        for key, sign in (("maximum", "<="), ("exclusiveMaximum", "<"))
        if schema.get(key, MANY) < MANY
    ]
    return description + named + (f" [{''.join(low)}x{''.join(high)}]" if low or high else "")
