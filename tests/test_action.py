"""The GitHub Action without GitHub: its own shell steps, in their order, with the values that GitHub would fill in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

from tests.scripts import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / "docs" / "examples" / "github-workflow.yml").read_text())

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the action's steps are written for bash")


def run(folder: Path, **given: str) -> SimpleNamespace:
    """Run the shell steps: their `codes`, {name of a step: exit status}, and `log`. A step that fails ends the job."""
    inputs = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()} | given
    values = {f"inputs.{name}": value for name, value in inputs.items()} | {"github.action_path": str(ROOT)}
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, arguments in (("python", ""), ("gblm-compress", "-m gblm_compress")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.write_text("")
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "RUNNER_TEMP": str(folder), "PYTHONPATH": search}
    fixed = os.environ | paths | {"HF_HUB_OFFLINE": "1"} | {name: str(path) for name, path in files.items()}
    job = SimpleNamespace(codes={}, log="")
    for step in (step for step in ACTION["runs"]["steps"] if "run" in step):
        assert step["shell"] == "bash" and "${{" not in step["run"]  # values are never part of a script
        own = {key: values[re.fullmatch(r"\$\{\{ (.*) \}\}", text)[1]] for key, text in step["env"].items()}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=folder, env=fixed | own, capture_output=True, text=True)
        job.log += done.stdout + done.stderr
        job.codes[step["name"]] = done.returncode
        if done.returncode:
            break
    job.summary, job.outputs = files["GITHUB_STEP_SUMMARY"].read_text(), files["GITHUB_OUTPUT"].read_text()
    return job


INSTALL = f"--dry-run --no-deps --no-build-isolation {ROOT}"  # pip reads the package, and installs nothing


def test_a_gate_that_fails_is_published_and_not_again_by_a_later_use_that_fails(tmp_path) -> None:
    gates = "gates={artefact: pruned, max_bytes_ratio: 0.9}"
    asked = "\n".join((gates, "benchmark=null", "export=[]", "prune.fit=none"))
    job = run(tmp_path, recipe="ci-smoke", set=asked, install=INSTALL)
    assert job.codes == {"Install": 0, "Check the recipe": 0, "Run": 6}, job.log
    assert "1 of 1 gates failed\nmax_bytes_ratio on pruned: 1.00×; at most 0.900× is needed" in job.log
    assert "artefacts: runs/ci\n" in job.log  # the summary is printed all the same
    (annotation,) = [line for line in job.log.splitlines() if line.startswith("::error")]
    assert annotation.startswith("::error title=gate failed::max_bytes_ratio on pruned: 1.00×; at most 0.900×")
    assert "## FAIL: tiny" in job.summary and "- max\\_bytes\\_ratio on pruned" in job.summary
    passed, report_, folder = (line.partition("=")[2] for line in job.outputs.splitlines())
    assert (passed, report_) == ("false", "runs/ci/report.html") and (tmp_path / report_).exists()
    assert {path.name for path in Path(folder).iterdir()} == {"report.html", "report.json", "gates.xml", "charts"}
    for path in (tmp_path / "runs/ci/gates.xml", Path(folder) / "gates.xml"):
        assert ElementTree.parse(path).getroot().get("failures") == "1"
    later = run(tmp_path, recipe="ci-smoke", set=f"{asked}\nmodel=owner/gone", install=INSTALL, output="runs/other")
    assert later.codes == {"Install": 0, "Check the recipe": 0, "Run": 3}, later.log
    assert (later.outputs, later.summary) == ("passed=false\n", "") and "::error" not in later.log


def test_an_output_with_a_line_break_sets_no_outputs(tmp_path) -> None:
    job = run(tmp_path, recipe="ci-smoke", output="x\npassed=true", install=INSTALL)
    assert job.codes == {"Install": 0, "Check the recipe": 2} and job.outputs == ""
    assert "::error title=gblm-compress::output has a line break; give one folder" in job.log.splitlines()


def test_a_recipe_with_faults_ends_before_the_work_with_an_annotation_each(tmp_path) -> None:
    job = run(tmp_path, recipe="ci-smoke", set="prune.patern=4:8\ncalibration.samples=0", install=INSTALL)
    assert job.codes == {"Install": 0, "Check the recipe": 2}
    annotations = [line for line in job.log.splitlines() if line.startswith("::error title=gblm-compress::")]
    assert len(annotations) == 2 and any("did you mean 'pattern'?" in line for line in annotations)
    assert not (tmp_path / "runs").exists()


def test_the_example_gives_what_the_action_takes() -> None:
    (step,) = [step for step in WORKFLOW["jobs"]["compress"]["steps"] if "gblm-compress" in step.get("uses", "")]
    required = {name for name, entry in ACTION["inputs"].items() if entry.get("required")}
    assert required <= set(step["with"]) <= set(ACTION["inputs"])
    named = re.findall(r"steps\.compress\.outputs\.(\w+)", str(WORKFLOW))
    assert named and set(named) <= set(ACTION["outputs"])
