"""Commands and recipes of README.md, docs/ and the help: each is read by its program, up to where work would begin."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import pytest
import typer.main
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from gblm_compress import api, tasks
from gblm_compress.cli.app import ClickException, app
from gblm_compress.errors import GblmError
from gblm_compress.measure import zero_shot
from gblm_compress.models import finding
from gblm_compress.runs import pipeline, run_report
from gblm_compress.runs.recipe import SHIPPED, read_yaml
from gblm_compress.settings import Recipe
from tests.forks import Server
from tests.scripts import BLOCK, ROOT, blocks

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PLACEHOLDERS = {"RANK": "1", "NEW": "magnitude"}  # for what is no name or path
PROGRAMS = ("accelerate", "gblm-compress", "make", "python", "pip", "torchrun", "vllm")
GROUP: Any = typer.main.get_command(app)


def inline() -> Iterator[str]:
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text())):
            yield " ".join(code.split())


def command(line: str) -> list[str] | None:
    """The words of a command from its program on, without what is set before it; None where there is none."""
    line = re.sub(r"\b(RANK|NEW)\b", lambda found: PLACEHOLDERS[found[0]], line.partition(" > ")[0])
    words = shlex.split(line, comments=True)
    start = next((i for i, word in enumerate(words) if word in PROGRAMS), None)
    before = words[:start]
    is_set = before[:1] in ([], ["taskset"], ["env"]) or "=" in before[0]
    return words[start:] if start is not None and is_set else None


BLOCKS, RECIPES = ([block for page in PAGES for block in blocks(language, page=page)] for language in ("", "yaml"))
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
LINES += [code for code in inline() if code.startswith(tuple(f"{program} " for program in PROGRAMS))]
LINES += [each.example for each in api.COMMANDS]
COMMANDS = [words for line in LINES if (words := command(line))]


class WorkBegins(Exception):
    """All that a user gave was read."""


@pytest.fixture
def stop_before_work(monkeypatch, tmp_path) -> None:
    """Models and texts need not exist; files and folders that are written are looked for in an empty folder."""

    for module, names in ((finding, "resolve_model outlined"), (pipeline, "check run"), (run_report, "read")):
        for name in names.split():
            monkeypatch.setattr(module, name, Mock(side_effect=WorkBegins))
    for module, name in ((tasks, "data_files"), (zero_shot, "check_folder")):
        monkeypatch.setattr(module, name, lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-recipe.yaml").write_text("model: demo\n")


def read_by_this_program(*arguments: str) -> None:
    if len(arguments) == 1:  # a command by its name, or an option that does something at once
        assert arguments[0] in GROUP.commands or arguments[0] in options_of(GROUP)
        return
    for path in (word for word in arguments if word.startswith(("tests/", "recipes/"))):
        assert (ROOT / path).exists(), path
    with pytest.raises(WorkBegins):
        GROUP.main(args=list(arguments), standalone_mode=False)


def read_by_make(target: str, *variables: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in (variable.partition("=")[0] for variable in variables):
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), name


def read_by_python(*arguments: str) -> None:
    by_name = arguments[0] == "-m"
    script, given = arguments[by_name], {word for word in arguments if word.startswith("--")}
    assert find_spec(script) if by_name else (ROOT / script).is_file(), script
    assert not given or given <= options_of_script(*arguments[: by_name + 1])


@cache
def options_of_script(*script: str) -> set[str]:
    """Those that its help names, in a fork that has most modules imported."""
    run = f"module({script[1]!r}" if script[0] == "-m" else f"path({script[0]!r}"
    code = f"import runpy, sys\nsys.path.insert(0, 'benchmarks')\nrunpy.run_{run}, run_name='__main__')"
    with TemporaryDirectory() as cache:
        done = Server().run(["--help"], ROOT, Path(cache), code=code)
    assert done.code == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


def read_by_pip(verb: str, *arguments: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {f"{name}[{extra}]" for name in (".", project["name"]) for extra in project["optional-dependencies"]}
    assert verb == "install"
    for what in (word for word in arguments if not word.startswith("--")):
        assert what in {".", *extras} or what in (ROOT / "Makefile").read_text(), what


def read_by_torchrun(*arguments: str, parser=get_args_parser) -> None:
    given = parser().parse_args(arguments)
    assert given.module and given.training_script == "gblm_compress"
    read_by_this_program(*given.training_script_args)


def read_by_vllm(*arguments: str) -> None:
    """vLLM is not installed here; its tests run with the words that stand in this file."""
    tested = (ROOT / "tests" / "serving" / "test_engine.py").read_text()
    verb, _, *options = arguments
    assert verb == "serve" and all(f'"{option}"' in tested for option in options if option.startswith("--"))


READERS = {
    "accelerate": lambda verb, *arguments: read_by_torchrun(*arguments, parser=launch_command_parser),
    "gblm-compress": read_by_this_program,
    "make": read_by_make,
    "python": read_by_python,
    "pip": read_by_pip,
    "torchrun": read_by_torchrun,
    "vllm": read_by_vllm,
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_what_its_program_takes(words: list[str], stop_before_work) -> None:
    READERS[words[0]](*words[1:])


WRONG = """\
gblm-compress prune MODEL -o pruned --pattrn 2:4
gblm-compress run quickstart --set prune.patern=4:8
accelerate launch --multi_gpu -m gblm_compress prune MODEL -o pruned --fit better
make fuzz HOURS=1
python benchmarks/gpu.py --gone 1
pip install gone
vllm serve bitmask --gone
"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_a_wrong_command_is_noticed(line: str, stop_before_work) -> None:
    words = command(line)
    assert words
    with pytest.raises((AssertionError, SystemExit, GblmError, ClickException)):
        READERS[words[0]](*words[1:])


def test_no_block_is_left_out() -> None:
    assert {words[0] for words in COMMANDS} == set(PROGRAMS) and len(COMMANDS) > 30
    for block in BLOCKS:
        lines = block.replace("\\\n", " ").splitlines()
        assert all(map(command, lines)) or "─" in block, block
    languages = {language for page in PAGES for language, _ in BLOCK.findall(page.read_text())}
    assert languages == {"", "bash", "python", "yaml"}  # bash: a batch job, which has no program of ours to check


def options_of(command: Any) -> set[str]:
    return {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)}


def test_options_named_in_the_text_exist() -> None:
    known = set().union(*map(options_of, (GROUP, *GROUP.commands.values())), {"--help", "--toy", "--extra-index-url"})
    named = {word for code in inline() if code.startswith("--") for word in code.split() if word.startswith("--")}
    assert len(named) > 40 and not named - known


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.partition("\n")[0])
def test_a_yaml_block_is_part_of_a_recipe_a_task_file_or_a_job(block: str, stop_before_work) -> None:
    part = read_yaml(block.encode(), str).plain()
    if scripts := [job["script"] for job in part.values() if isinstance(job, dict) and "script" in job]:
        for words in (command(line) for script in scripts for line in script):
            assert words
            READERS[words[0]](*words[1:])
        return
    if "task" in part:
        tasks = (ROOT / "tests" / "measure" / "zero_shot_tasks").glob("*.yaml")
        assert part.keys() <= {key for task in tasks for key in yaml.safe_load(task.read_text())}
        return
    whole = read_yaml((SHIPPED / "quickstart.yaml").read_bytes(), str).plain()
    assert Recipe.model_validate(whole | part, strict=True)


def test_pages_for_users_are_short_and_so_are_their_sentences() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    assert readme.index("## Try it") <= 40 and len(readme) <= 120
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (how_to,) = [entry["How to"] for entry in navigation if "How to" in entry]
    for page in [page for entry in how_to for page in entry.values()]:
        text = (ROOT / page).read_text()
        assert text.count("\n") <= 90, page
        prose = re.sub(r"^(\||#|!).*", "", BLOCK.sub("", text), flags=re.MULTILINE)
        sentences = re.split(r"(?<=[.:;!?])\s+|\n\s*\n|\n- ", re.sub(r"`[^`]*`|\]\([^)]*\)", "x", prose))
        words = [len(sentence.split()) for sentence in sentences if sentence.strip()]
        assert sum(words) / len(words) <= 18, page
