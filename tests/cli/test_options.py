"""Options made from settings: in toy commands, and in the help and the completion of the real ones."""

import os
import re
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from gblm_compress import suggestions
from gblm_compress.cli import commands
from gblm_compress.cli.app import app
from gblm_compress.cli.options import PanelCommand, Spelt, from_settings
from gblm_compress.errors import UsageError
from gblm_compress.settings import (
    BenchmarkSettings,
    CompareSettings,
    EvaluateSettings,
    ExportSettings,
    Panel,
    PruneSettings,
    RecoverSettings,
    Settings,
)

OFFERED = {
    "prune": PruneSettings,
    "export": ExportSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "benchmark": BenchmarkSettings,
}
RENAMED = {"overrides": "override"}


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

    def toys(offer: Any) -> None:
        """A toy command."""
        got.append(offer)

    toys.__annotations__["offer"] = offered
    program = typer.Typer(rich_markup_mode=None, add_completion=False)
    program.command(cls=PanelCommand)(from_settings(toys))
    done = CliRunner().invoke(program, list(arguments))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return got[0] if got else done.output


def test_a_field_is_an_option_without_another_edit() -> None:
    text = ask("--help")
    common, _, fit = text.partition("Fit:")
    shown = " ".join(common.split())
    assert re.search(r"--toy-count <?\w+>? +Toys in a box\. \[1<=x<=9\] +\\?\[default: 3\]", " ".join(fit.split()))
    assert re.search(r"--toy-kinds <str>,\.\.\. What they are\. \[ball, kite\] \\?\[default: ball\]", shown)
    assert re.search(r"--toy-weight <?\w+>? Weight of the toy in kg\. \[0<x<1\]", shown)
    assert "--wrapped In paper." in shown and "--no-wrapped" not in shown
    assert "--ribbon / --no-ribbon" in shown and "secret" not in text
    given = ask("--toy-count", "5", "--toy-weight", "0.5", "--wrapped", "--no-ribbon", "--method", "wanda")
    assert (given.toy_count, given.toy_weight, given.wrapped, given.ribbon) == (5, 0.5, True, False)
    assert given.method == "wanda"
    assert "--toy-sizes <int>,... In cm." in shown
    given = ask("--toy-sizes", "3,4", "--toy-owner", "Ann")
    assert (given.toy_sizes, given.toy_owner) == ((3, 4), "Ann")


def test_what_is_not_given_is_left_to_presets_and_defaults() -> None:
    assert ask() == Toys()
    assert ask().model_fields_set == set()
    assert ask("--preset", "sparsegpt") == Toys(preset="sparsegpt")
    given = ask("--preset", "sparsegpt", "--method", "gblm")  # the default, but given
    assert (given.method, given.update) == ("gblm", "obs")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--toy-kinds", "ball,kite", "--ignore", "a,b", "--overrides", "x=2:4,y=unstructured@0.3"),
        ("--toy-kinds", "ball", "--toy-kinds", "kite", "--ignore", "a", "--ignore", "b,", "--overrides", "x=2:4",
         "--overrides", "y=unstructured@0.3"),
    ],
    ids=["commas", "repetition"],
)  # fmt: skip
def test_sequences_take_commas_or_repetition(arguments) -> None:
    given = ask(*arguments)
    assert given.toy_kinds == ("ball", "kite") and given.ignore == ("a", "b")
    assert [(o.layers, o.pattern, o.sparsity) for o in given.overrides] == [
        ("x", "2:4", None),
        ("y", "unstructured", 0.3),
    ]


def test_a_sequence_of_nothing_is_not_the_default() -> None:
    assert ask("--toy-kinds", "").toy_kinds == () != ask().toy_kinds
    with pytest.raises(UsageError, match="^--data: "):
        ask("--data", ",", offered=RecoverSettings)


def test_batches_may_be_repeated_as_all_sequences() -> None:
    assert ask("--batch", "1,2", "--batch", "4", offered=BenchmarkSettings).batch == (1, 2, 4)


def test_a_field_may_have_another_name_or_none() -> None:
    offered = Annotated[EvaluateSettings, Spelt(rename={"dataset": "text"}, leave_out=("limit",))]
    given = ask("--text", "x.txt", offered=offered)
    assert (given.dataset, given.limit) == ("x.txt", None)
    assert "--dataset" not in ask("--help", offered=offered) and "--limit" not in ask("--help", offered=offered)
    with pytest.raises(UsageError, match="^--length: input should be greater than or equal to 2"):
        ask("--length", "1", offered=Annotated[EvaluateSettings, Spelt(rename={"sequence_length": "length"})])


@pytest.mark.parametrize("spelt", [Spelt(rename={"data_set": "text"}), Spelt(leave_out=("data_set",))], ids=repr)
def test_a_name_that_is_no_field_fails_at_import(spelt: Spelt) -> None:
    def command(settings: Any) -> None: ...

    command.__annotations__["settings"] = Annotated[EvaluateSettings, spelt]
    with pytest.raises(TypeError, match="'data_set' is no field of EvaluateSettings; there are dataset, "):
        from_settings(command)


def test_two_options_of_one_name_fail_at_import() -> None:
    def command(settings: EvaluateSettings, others: EvaluateSettings) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'dataset'"):
        from_settings(command)


def help_of(*command: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", [[], *([command.__name__] for command in commands.COMMANDS)], ids=str)
def test_help_fits_80_columns(command: list[str]) -> None:
    assert max(map(len, help_of(*command).splitlines())) <= 80


def test_compare_has_no_seed_as_it_goes_through_several() -> None:
    assert "--seeds " in help_of("compare") and "--seed " not in help_of("compare")


@pytest.mark.parametrize(("command", "settings"), OFFERED.items(), ids=OFFERED)
def test_help_names_options_choices_ranges_and_panels(command: str, settings: type[Settings]) -> None:
    text = help_of(command)
    blocks = {
        block.split()[0]: re.sub(r"(?<=\w)-\s+", "-", " ".join(block.split()))  # names are broken at their hyphens
        for block in re.findall(r"^  (--[a-z].*(?:\n(?!  -)(?:   .*))*)", text, re.MULTILINE)
    }
    for name, field in settings.model_fields.items():
        if Panel.NO_OPTION in field.metadata:
            assert f"--{name.replace('_', '-')} " not in text
            continue
        if (command, name) == ("compare", "sequence_length"):
            name = "evaluation_length"
        block = blocks[f"--{RENAMED.get(name, name).replace('_', '-')}"]
        assert all(choice in block for choice in suggestions.allowed(settings, name)), block
        if field.default not in (None, (), False) and not field.is_required():
            assert "[default: " in block
        for limit in field.metadata:
            assert not hasattr(limit, "ge") or f"[{limit.ge}<=x" in block
    if command == "prune":
        assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["Arguments", "Common", "Method", "Fit", "Resources"]
        assert text.index("Fit:") < text.index("--damping") < text.index("Resources:") < text.index("--memory")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("prune --method ", ["gblm", "wanda", "gradient", "magnitude", "regional", "obs"]),
        ("prune --method g", ["gblm", "gradient"]),
        ("evaluate --dtype b", ["bfloat16"]),
        ("export --format b", ["bitmask", "bitmask-int8", "bitmask-int4"]),
        ("export --format s", ["semi-structured", "semi-structured-int8", "semi-structured-int4"]),
        ("benchmark --runtimes torch,", ["torch,torch", "torch,vllm", "torch,onnxruntime", "torch,genai"]),
    ],
)
def test_the_shell_completes_choices(words: str, completed: list[str]) -> None:
    code = "import sys; sys.argv = ['gblm-compress']; from gblm_compress.cli.app import main; main()"
    environment = {
        "_GBLM_COMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": f"gblm-compress {words}",
        "COMP_CWORD": str(len(words.split(" "))),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == completed
