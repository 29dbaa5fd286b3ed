"""Options made from settings: in toy commands, and in the help and the completion of the real ones."""

import re
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from gblm_compress.api import COMMANDS, GROUPS
from gblm_compress.cli import options
from gblm_compress.cli.app import app
from gblm_compress.command import SPELLINGS, command
from gblm_compress.settings import BenchmarkSettings, Panel, PruneSettings
from tests.scripts import python


class Toys(PruneSettings):
    """Real settings with fields of every kind added, and nothing else."""

    toy_count: Annotated[int, Panel.FIT] = Field(3, ge=1, le=9, description="Toys in a box.")
    toy_kinds: tuple[Literal["ball", "kite"], ...] = Field(("ball",), description="What they are.")
    toy_weight: float | None = Field(None, gt=0, lt=1, description="Weight of the toy in kg.")
    toy_sizes: tuple[int, ...] | None = Field(default_factory=lambda: (2, 1), description="In cm.")
    toy_owner: int | str | None = Field(None, description="A number or a name.")
    wrapped: bool = Field(False, description="In paper.")
    ribbon: bool | None = Field(None, description="With a ribbon; if unset, where it fits.")
    toy_secret: Annotated[int, Panel.NO_OPTION] = Field(7, description="For recipes and Python.")


def ask(*arguments: str, offered: Any = Toys) -> Any:
    """The settings that a toy command gets from a command line, or its help."""
    got = []

    def toys(*, offer: Any) -> None:
        """A toy command."""
        got.append(offer)

    toys.__annotations__["offer"] = offered
    program = typer.Typer(rich_markup_mode=None, add_completion=False)
    options.add(program, command()(toys).command)
    done = CliRunner().invoke(program, [*arguments, "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return got[0] if got else done.output


def test_a_field_is_an_option_without_another_edit() -> None:
    text = ask("--help-all")
    common, _, fit = (" ".join(part.split()) for part in text.partition("Fit:"))
    assert re.search(r"--toy-count <?\w+>? +Toys in a box\. \[1<=x<=9\] +\\?\[default: 3\]", fit)
    assert re.search(r"--toy-kinds <str>,\.\.\. What they are\. \[ball, kite\] \\?\[default: ball\]", common)
    assert re.search(r"--toy-weight <?\w+>? Weight of the toy in kg\. \[0<x<1\]", common)
    assert "--wrapped In paper." in common and "--no-wrapped" not in common
    assert "--ribbon / --no-ribbon" in common and "secret" not in text
    assert "--toy-sizes <int>,... In cm." in common
    asked = "--toy-count 5 --toy-weight 0.5 --wrapped --no-ribbon --toy-sizes 3,4 --toy-owner Ann"
    given = ask(*asked.split())
    assert (given.toy_count, given.toy_weight, given.wrapped, given.ribbon) == (5, 0.5, True, False)
    assert (given.toy_sizes, given.toy_owner) == ((3, 4), "Ann")


def test_a_field_that_is_not_given_is_left_to_presets_and_defaults() -> None:
    assert ask() == Toys() and ask().model_fields_set == set()
    assert ask("--preset", "sparsegpt") == Toys(preset="sparsegpt")
    given = ask("--preset", "sparsegpt", "--method", "gblm")  # the default, but given
    assert (given.method, given.fit) == ("gblm", "obs")


def test_sequences_take_commas_or_repetition() -> None:
    repeated = "--toy-kinds ball --toy-kinds kite --ignore a --ignore b, --override x=2:4 --override y=unstructured@0.3"
    given = ask("--toy-kinds", "ball,kite", "--ignore", "a,b", "--override", "x=2:4,y=unstructured@0.3")
    assert given == ask(*repeated.split())
    assert given.toy_kinds == ("ball", "kite") and given.ignore == ("a", "b")
    overrides = [(o.layers, o.pattern, o.sparsity) for o in given.overrides]
    assert overrides == [("x", "2:4", None), ("y", "unstructured", 0.3)]
    assert ask("--batch", "1,2", "--batch", "4", offered=BenchmarkSettings).batch == (1, 2, 4)
    assert ask("--toy-kinds", "").toy_kinds == ()  # an empty one is not the default


@pytest.mark.parametrize("declared", COMMANDS, ids=lambda each: each.name)
def test_help_names_options_by_panel_and_an_example(declared) -> None:
    text = CliRunner().invoke(app, [declared.name, "--help-all"]).output
    assert max(map(len, text.splitlines())) <= 80
    blocks = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    short = CliRunner().invoke(app, [declared.name, "--help"]).output
    rare = set()
    for part in declared.parts.values():
        for name, field in part.kind.model_fields.items():
            option, panel = f"--{SPELLINGS.get(name, part.names.get(name, '-')).replace('_', '-')}", {*field.metadata}
            if name not in part.names or Panel.NO_OPTION in panel:
                assert option not in blocks
                continue
            assert (f"  {option} " in short) == (not panel & {*Panel}) and option in blocks
            rare |= panel & {*Panel}
    assert ("--help-all" in short) == (short != text) == bool(rare)
    assert declared.example and short.endswith(f"\nExample:\n  {declared.example}\n")
    assert declared.example.split()[:2] == ["gblm-compress", declared.name]


def test_the_help_of_the_program_has_a_line_for_each_command_in_its_group() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    blocks = re.findall(r"^(\w+):\n((?:  .*\n)+)", text, re.MULTILINE)
    shown = {group: [line.split()[0] for line in lines.splitlines()] for group, lines in blocks}
    del shown["Options"]
    assert shown == {group: [each.name for each in commands] for group, commands in GROUPS.items()}
    assert CliRunner().invoke(app, []).output.strip() == text.strip()
    assert "..." not in text.partition("Make:")[2] and max(map(len, text.splitlines())) <= 80


def test_what_is_missing_or_wrong_is_named() -> None:
    assert "Missing argument 'MODEL'" in CliRunner().invoke(app, ["prune"]).output
    assert "Invalid value for '--samples'" in CliRunner().invoke(app, ["prune", "--samples", "x"]).output


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("prune --method g", ["gblm", "gradient"]),
        ("benchmark --runtimes torch,", ["torch,torch", "torch,vllm", "torch,onnxruntime", "torch,genai"]),
    ],
)
def test_the_shell_completes_choices(words: str, completed: list[str]) -> None:
    code = "import sys; sys.argv = ['gblm-compress']; from gblm_compress.cli.app import main; main()"
    asked = {"COMP_WORDS": f"gblm-compress {words}", "COMP_CWORD": str(len(words.split(" ")))}
    done = python("-c", code, **asked, _GBLM_COMPRESS_COMPLETE="complete_bash")
    assert (done.stdout.split(), done.stderr) == (completed, "")
