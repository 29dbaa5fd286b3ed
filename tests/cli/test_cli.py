"""The program as a user meets it: in processes of its own, by exit code, stdout and stderr. Most are forks."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from gblm_compress import __version__, errors
from tests.runs.reports import write_report
from tests.scripts import ROOT

LIGHT = """
import sys
from gblm_compress.cli.app import _run

for line in sys.stdin:
    assert _run(line.split()) in ((0,) if "help" in line else (2, 3)), line
heavy = {"torch", "transformers", "onnx", "onnxruntime", "datasets", "optimum", "matplotlib", "lm_eval"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


TWICE_WRONG = "--set prune.pattern=unstructured --set calibration.dataset=./gone.txt"
TWO_FAULTS = "2 faults dataset './gone.txt': no such file model.layers.0.self_attn.q_proj: pattern unstructured is not"


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("prune tiny -o x --method foo", 2, "--method: input should be 'gblm'"),
        ("prune tiny -o x --sparsity 50", 2, "--sparsity: input should be less than 1, got 50.0; did you mean 0.5?"),
        ("prune tiny -o x --dataset demo", 2, "No such option: --dataset"),
        ("run quikstart", 2, "recipe 'quikstart': no such file; did you mean 'quickstart'?"),
        ("compare tiny --evaluation-length 1", 2, "--evaluation-length: input should be greater than or equal to 2"),
        ("compare tiny --patterns 2:4,5:4", 2, "--patterns: pattern '5:4' is not known"),
        ("prune tiny -o x --override '*=2:4,*=unstructured@1.5'", 2, "--override (number 2), sparsity: input should"),
        ("frobnicate", 2, "No such command"),
        ("recover ./gone --teacher ./lost -o x --data ./gone.txt,demo", 2, "error: 3 faults model './gone': no such"),
        *((f"{name} ci-smoke {TWICE_WRONG}", 2, TWO_FAULTS) for name in ("run", "validate")),
    ],
)  # fmt: skip
def test_bad_input_gets_one_message_and_its_code(program, tmp_path, line, code, message) -> None:
    done = program(*shlex.split(line))
    assert (done.code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and "after validation" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_validated(program, tmp_path) -> None:
    said = program("validate", "ci-smoke").stdout
    assert "ci-smoke.yaml: valid\n• prune tiny by gblm, 2:4\n" in said
    assert said.endswith("next: gblm-compress run ci-smoke\n")
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model: demo\nprun: {}\n")
    done = program("validate", str(recipe), "--json")
    (missing,) = json.loads(done.stdout)["faults"]
    assert done.code == 2 and json.loads(done.stdout)["valid"] is False
    assert missing.endswith("my.yaml:2: prun: unknown key; did you mean 'prune'?") and missing in done.stderr


def test_a_report_of_two_runs(program, tmp_path) -> None:
    for name, tpot in (("before", 10.0), ("now", 14.0)):
        write_report(tmp_path / name, tpot=tpot)
    done = program("report", "before", "now", "-o", "joined.html", "--fail-on-regression", "--json")
    assert done.code == 6 and "bitmask in torch, batch 1: TPOT 10.00 ms → 14.00 ms" in done.stderr
    assert json.loads(done.stdout)["regressions"] and "the previous one" in (tmp_path / "joined.html").read_text()
    assert program("report", "now", "-o", "joined.html").code == 0  # its own page may be replaced


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run mine.yaml --summary mine.yaml", "exists and was not written by this program"),
        ("run ci-smoke --junit job.sh", "JUnit file 'job.sh': give a name that ends in .xml"),
        ("report ran -o notes.html", "exists and was not written by this program"),
    ],
)
def test_a_file_of_the_user_is_not_replaced_by_a_document(program, tmp_path, line: str, message: str) -> None:
    write_report(tmp_path / "ran")
    mine = tmp_path / line.split()[-1]
    mine.write_text("model: tiny\n")
    done = program(*line.split())
    assert done.code == 2 and message in done.stderr and mine.read_text() == "model: tiny\n"


SCRIPT = "from gblm_compress.__main__ import main; main()"  # what pip writes for `gblm-compress`


def interrupted(start: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Start the program with a folder's modules; a shell that started the tests in the background ignores SIGINT."""
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; sys.path.insert(0, {str(folder)!r}); {start}"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("start", ["import runpy; runpy.run_module('gblm_compress', run_name='__main__')", SCRIPT])
@pytest.mark.parametrize(("module", "arguments"), [("pydantic", ["--help"]), ("torch", ["prune", "tiny", "-o", "x"])])
@pytest.mark.parametrize("made", ["pass", "raise ValueError('as pydantic makes of it')"])
def test_interruption_while_modules_are_imported(start, module, arguments, made, tmp_path) -> None:
    """A module that interrupts its own import stands before the real one, in a process of its own."""
    interrupts = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"{module}.py").write_text(f"{interrupts}finally: {made}\n")
    ended = interrupted(start, tmp_path, *arguments)
    assert ended.returncode == 130 and ended.stdout == ""
    *before, last = ended.stderr.splitlines()
    assert last.startswith("interrupted") and ("run the same command again" in last) == (module == "torch")
    assert before in ([], [f"gblm-compress {__version__} starts …"])


def test_the_second_interruption_ends_the_process_at_once(tmp_path) -> None:
    """The first is still being cleaned up after."""
    interrupts = "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    (tmp_path / "pydantic.py").write_text(f"import os, signal, time\ntry: {interrupts}\nfinally: {interrupts}\n")
    ended = interrupted(SCRIPT, tmp_path, "--help")
    assert ended.returncode == -signal.SIGINT and ended.stderr == ""


def of_memory() -> errors.ModelError:
    error = errors.ModelError("'x': ONNX Runtime cannot load it")
    error.__cause__ = MemoryError()
    return error


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyError("x"), 1, "a fault of this program; please report it (KeyError: 'x')"),
        (AssertionError(), 1, "(AssertionError: AssertionError)"),
        (MemoryError(), 4, "memory ran out (MemoryError)"),
        (of_memory(), 4, "memory ran out ('x': ONNX Runtime cannot load it)"),
        (OSError(28, "No space left on device", "/x"), 2, "the disk is full ([Errno 28] No space left on device: '/x'"),
        (PermissionError(13, "not permitted", "/x"), 1, "the system reports an error ([Errno 13] not permitted: '/x')"),
        (RecursionError("maximum"), 1, "nested too deeply (maximum)"),
        (ValueError("a\x1b[2J\nb"), 1, r"ValueError: a\x1b[2J)"),
    ],
)
def test_an_exception_that_nobody_foresaw_gets_a_message(monkeypatch, capsys, raised, code, message) -> None:
    from gblm_compress.cli import app
    from gblm_compress.measure import doctor

    monkeypatch.setattr(doctor, "diagnose", Mock(side_effect=raised))
    with pytest.raises(type(raised)):  # tests and callers see it as it is
        app._run(["doctor"])
    with pytest.raises(SystemExit) as ended:
        app.main(["doctor"])
    assert ended.value.code == code
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and "GBLM_COMPRESS_TRACEBACK=1" in shown
    monkeypatch.setenv("GBLM_COMPRESS_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        app.main(["doctor"])
    shown = capsys.readouterr().err
    assert message in shown and "Traceback (most recent call last)" in shown and "in doctor" in shown


@pytest.mark.parametrize("command", ["schema", "validate ci-smoke --json --quiet"])
def test_a_reader_that_leaves_ends_the_program_quietly(command: str) -> None:
    arguments = [sys.executable, "-m", "gblm_compress", *command.split()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.parametrize("command", ["schema >&-", "schema 2>&-", "schema >&- 2>&-"])
def test_closed_streams_are_no_fault(command: str) -> None:
    whole = f"{sys.executable} -m gblm_compress {command}"
    assert subprocess.run(whole, shell=True, cwd=ROOT, capture_output=True).returncode == 0


def test_control_characters_and_markup_reach_no_terminal(program) -> None:
    """In arguments, file names and models, in errors of this program and of the parser."""
    name = "./a\x1b[31m[red]\udcff\u202e\nb"
    prune = ("prune -o x", *(f"prune tiny -o x --{option}" for option in ("calibration", "method", "samples")))
    for command in (*prune, "validate", "", "compare tiny --methods"):
        done = program(*command.split(), name)
        assert done.code in (2, 3), done.stderr
        assert all(letter.isprintable() or letter == "\n" for letter in done.stderr), done.stderr


def test_help_and_misspelt_paths_load_no_torch(tmp_path) -> None:
    for name in ("file", "picture.png", "mine/thesis.tex"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    wrong = (
        "prune ./gone -o x", "prune tiny -o x --calibration ./gone.txt", "prune tiny -o file/below",
        "export ./gone -o x --format onnx", "evaluate ./gone", "evaluate tiny --dataset gone.jsonl",
        "evaluate tiny --dataset demo --include-path gone", "benchmark tiny --baseline ./gone",
        "compare tiny -o mine --calibration demo --dataset demo", "inspect tiny --heat-map picture.png",
        "run gone.yaml", "run ci-smoke -o mine", "validate gone.yaml", "report gone", "push gone bitmask",
    )  # fmt: skip
    lines = "\n".join(("--help", "prune --help", "prune --help-all", *wrong))
    done = subprocess.run([sys.executable, "-c", LIGHT], input=lines, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--gradient-norm" in done.stdout and done.stderr.count("error: ") == len(wrong)


def test_exit_codes_are_distinct_and_documented() -> None:
    from gblm_compress.cli.app import EPILOG

    names = ("UsageError", "InputError", "MissingDependencyError", "VerificationError", "GateError")
    codes = [getattr(errors, name).exit_code for name in names]
    assert codes == [2, 3, 4, 5, 6] and all(f" {code} " in EPILOG for code in codes)
