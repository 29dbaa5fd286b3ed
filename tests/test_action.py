"""The GitHub Action without GitHub: its own shell steps, in their order, with the values that GitHub would fill in."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / "docs" / "examples" / "github-workflow.yml").read_text())

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the action's steps are written for bash")


@dataclass
class Job:
    """What a run of the steps left; `codes` is {name of the step: exit status}, up to the one that failed."""

    codes: dict[str, int]
    log: str
    summary: str
    outputs: str


def run(folder: Path, **given: str) -> Job:
    """Carry out the shell steps, of which a failing one ends the job."""
    inputs = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()} | given
    values = {f"inputs.{name}": value for name, value in inputs.items()} | {"github.action_path": str(ROOT)}
    tools = folder / "bin"
    tools.mkdir()
    for name, arguments in (("python", ""), ("gblm-compress", "-m gblm_compress")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.touch()
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    fixed = {"PATH": f"{tools}:{os.environ['PATH']}", "RUNNER_TEMP": str(folder), "PYTHONPATH": search}
    job = Job({}, "", "", "")
    for step in (step for step in ACTION["runs"]["steps"] if "run" in step):
        assert step["shell"] == "bash" and "${{" not in step["run"]  # values are never part of a script
        own = {key: values[re.fullmatch(r"\$\{\{ (.*) \}\}", text)[1]] for key, text in step["env"].items()}
        environment = os.environ | fixed | {name: str(path) for name, path in files.items()} | own
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        job.log += done.stdout + done.stderr
        job.codes[step["name"]] = done.returncode
        if done.returncode:
            break
    job.summary, job.outputs = files["GITHUB_STEP_SUMMARY"].read_text(), files["GITHUB_OUTPUT"].read_text()
    return job


INSTALL = f"--dry-run --no-deps --no-build-isolation {ROOT}"  # pip reads the package, and installs nothing


def test_a_run_whose_gate_fails_is_annotated_and_summarised(tmp_path) -> None:
    gates = "gates={artefact: pruned, max_bytes_ratio: 0.9}"
    asked = "\n".join((gates, "benchmark=null", "export=[]", "prune.fit=none"))
    job = run(tmp_path, recipe="ci-smoke", set=asked, install=INSTALL)
    assert job.codes == {"Install": 0, "Check the recipe": 0, "Run": 6}, job.log
    (annotation,) = [line for line in job.log.splitlines() if line.startswith("::error")]
    assert annotation.startswith("::error title=gate failed::max_bytes_ratio on pruned: 1.00×; at most 0.900×")
    assert "## FAIL: tiny" in job.summary and "- max\\_bytes\\_ratio on pruned" in job.summary
    assert job.outputs.splitlines() == ["passed=false", "report=runs/ci/report.html"]
    assert (tmp_path / "runs/ci/report.html").exists()
    assert ElementTree.parse(tmp_path / "runs/ci/gates.xml").getroot().get("failures") == "1"


def test_a_recipe_with_faults_ends_before_the_work_with_an_annotation_each(tmp_path) -> None:
    job = run(tmp_path, recipe="ci-smoke", set="prune.patern=4:8\ncalibration.samples=0", install=INSTALL)
    assert job.codes == {"Install": 0, "Check the recipe": 2}
    annotations = [line for line in job.log.splitlines() if line.startswith("::error title=gblm-compress::")]
    assert len(annotations) == 2 and any("did you mean 'pattern'?" in line for line in annotations)
    assert not (tmp_path / "runs").exists()


def test_the_example_gives_what_the_action_takes_and_the_action_uploads_what_a_run_writes() -> None:
    from gblm_compress.runs import report, run_report

    (step,) = [step for step in WORKFLOW["jobs"]["compress"]["steps"] if "gblm-compress" in step.get("uses", "")]
    required = {name for name, entry in ACTION["inputs"].items() if entry.get("required")}
    assert required <= set(step["with"]) <= set(ACTION["inputs"])
    named = re.findall(r"steps\.compress\.outputs\.(\w+)", str(WORKFLOW))
    assert named and set(named) <= set(ACTION["outputs"])
    (step,) = [step for step in ACTION["runs"]["steps"] if step.get("name") == "Upload the report"]
    names = {Path(line).name for line in step["with"]["path"].split()}
    assert {report.PAGE, report.PICTURES, run_report.REPORT} <= names and step["if"] == "always()"
